"""Named streams of random keys: resuming needs a seed and a step, never a saved key."""

from __future__ import annotations

import zlib

import jax

MAX_SEED = 2**32 - 1  # jax.random.key cuts off what is above: the streams would be those of another seed


def stream(root: jax.Array, name: str, step: int | jax.Array | None = None) -> jax.Array:
    """The key of the stream ``name``, or of its element ``step``: ``fold_in(fold_in(root, crc32(name)), step)``."""
    key = jax.random.fold_in(root, zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)
