"""A batch that is too large for a device's memory, some rows at a time, without moving rows between devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def piece_size(num_rows: int, num_devices: int, limit: int) -> int:
    """Rows of all devices together for ``map_in_pieces``: at most ``limit`` a device (0: no limit), in equal pieces.

    ``num_rows`` are split evenly over the devices, so the share of each is cut into pieces of its largest divisor that
    is not above the limit: with many pieces of one size there is one program, whatever the batch.
    """
    share = num_rows // num_devices
    limit = limit or share
    return num_devices * max(size for size in range(1, share + 1) if share % size == 0 and size <= limit)


def map_in_pieces(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
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

    # Row r is in piece r % p: rows that are split over devices stay where they are, in every piece.
    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(size, count // size, *x.shape[1:]), 0, 1)

    def join(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x, 0, 1).reshape(count, *x.shape[2:])

    return jax.tree.map(join, jax.lax.map(function, jax.tree.map(split, rows)))
