"""A batch that is too large for a device's memory, some rows at a time, without moving rows between devices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def piece_size(num_rows: int, num_devices: int, limit: int) -> int:
    """The size of a piece for ``map_in_pieces``, over all devices: at most ``limit`` rows a device (0: no limit).

    ``num_rows`` are split evenly over the devices. The share of each is cut into pieces of its largest divisor that is
    not above the limit, because all pieces must have one size.
    """
    share = num_rows // num_devices
    limit = limit or share
    return num_devices * max(size for size in range(1, share + 1) if share % size == 0 and size <= limit)


def map_in_pieces(function: Callable[[PyTree], PyTree], rows: PyTree, size: int) -> PyTree:
    """``function(rows)`` for a function that treats each row by itself, computed for ``size`` rows at a time.

    Args:
      function: from a tree of arrays [size, ...] to a tree of arrays [size, ...].
      rows: a tree of arrays [n, ...], n a multiple of ``size``.
      size: a multiple of the number of devices that the rows are split over, if they are.

    Returns:
      A tree of arrays [n, ...].
    """
    count = len(jax.tree.leaves(rows)[0])
    if size == count:
        return function(rows)

    # Row r is in piece r % p, so that every piece has rows of every device and no row moves.
    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(size, count // size, *x.shape[1:]), 0, 1)

    def join(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(count, *x.shape[2:])

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, rows)))
