"""The device mesh. Batches are split over all of its axes, large weights over "fsdp", everything else is replicated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from spo_jax.errors import UserError

AXES = ("data", "fsdp")
MIN_SPLIT_SIZE = 2**14  # elements; to gather a smaller weight costs more than to keep it


def make_mesh(data: int, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes "data" and "fsdp"; one of the sizes may be -1, for all devices that are left.

    ``devices`` are all that there are, or those of another machine, for which a program is only compiled.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(data, fsdp, len(devices))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_sizes(data: int, fsdp: int, count: int) -> tuple[int, ...]:
    """The sizes of a mesh of ``count`` devices; UserError as in ``make_mesh``."""
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if known > 0 and count % known == 0:
            sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(
            f"config.mesh = (data={data}, fsdp={fsdp}) does not fit the {count} devices here; "
            "use data=-1, fsdp=1 for all of them."
        )
    return tuple(sizes)


def check_divisible(name: str, size: int, mesh: Mesh) -> None:
    """Raises UserError if a global batch of ``size`` cannot be split evenly over the mesh."""
    if size % mesh.size:
        raise UserError(f"{name} = {size} cannot be split over {mesh.size} devices; make it a multiple of {mesh.size}.")


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array axis ``axis`` split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES))


def weight_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A weight split over the axis "fsdp" along its longest dimension that can be; replicated if small or odd."""
    parts = mesh.shape["fsdp"]
    fitting = [(size, axis) for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < MIN_SPLIT_SIZE or not fitting:
        return replicated(mesh)
    axis = max(fitting)[1]
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))


def weight_shardings(mesh: Mesh, tree: Any) -> Any:
    """``weight_sharding`` of every array of a tree: parameters, or a training state."""
    return jax.tree.map(lambda x: weight_sharding(mesh, x.shape), tree)


def constrain_batch(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Inside ``jit``: asks for every array of ``tree`` to be split along ``axis`` over all devices."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh, axis)), tree)
