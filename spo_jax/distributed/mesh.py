"""The device mesh. Batches are split over all of its axes, weights over "fsdp" by the rules in sharding.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.stages
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from spo_jax.errors import UserError

AXES = ("data", "fsdp")
P = ParamSpec("P")
R = TypeVar("R")


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes "data" and "fsdp"; one of the sizes may be -1, for all devices that are left.

    ``devices`` are by default all of this run; those of another machine serve to compile a program for it.

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


def round_up(size: int, num_devices: int) -> int:
    """The smallest batch size from ``size`` on that so many devices can split."""
    return math.ceil(size / num_devices) * num_devices


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Array axis ``axis`` split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, AXES))


def constrain_batch(mesh: Mesh, tree: PyTree, axis: int = 0) -> PyTree:
    """Inside ``jit``: asks for every array of ``tree`` to be split along ``axis`` over all devices."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_sharding(mesh, axis)), tree)


def jit_on(mesh: Mesh, function: Callable[P, R], **options: Any) -> jax.stages.Wrapped:
    """``jax.jit`` of a function with networks whose weights may be split over ``mesh``: see ``sharding.gathered``."""

    @functools.wraps(function)
    def on_mesh(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return jax.jit(on_mesh, **options)


def fetch(tree: PyTree) -> PyTree:
    """The arrays of a tree, readable by this process even where other processes hold parts of them.

    All processes must call this: they send each other their parts, one array at a time, into the host's memory.
    """

    def one(x: jax.Array) -> jax.Array | np.ndarray:
        whole = x.is_fully_addressable or x.is_fully_replicated
        return x if whole else multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)
