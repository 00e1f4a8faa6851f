"""Weights that are seldom used wait in the host's memory (``config.offload``) and visit the device when they are."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from spo_jax.distributed.sharding import weight_sharding

HOST = "pinned_host"
SELDOM_USED = ("text_encoder", "text_encoder_2", "clip")  # for a moment in each batch, or only between batches


def weight_placement(mesh: Mesh, *, offload: bool) -> Callable[[tuple[str, ...], tuple[int, ...]], NamedSharding]:
    """``place(path, shape)``: ``weight_sharding``, with ``offload`` in the host's memory for parts in ``SELDOM_USED``.

    Paths begin with the name of the part.
    """

    def place(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        sharding = weight_sharding(mesh, path, shape)
        return sharding.with_memory_kind(HOST) if offload and path[0] in SELDOM_USED else sharding

    return place


def in_host_memory(x: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array, or a shape with a sharding, lies in the host's memory."""
    return x.sharding is not None and x.sharding.memory_kind == HOST


def to_device(tree: PyTree) -> PyTree:
    """The arrays in the memory of their devices; those that are there already are not copied.

    The copies are freed when the last program that uses them has ended, unless the caller keeps them.
    """
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), tree))
