"""cuDNN's fused attention on NVIDIA GPUs, through ``jax.nn.dot_product_attention``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# cuDNN's own limit is 256 on Hopper and later; JAX asks the machine that compiles, which need not be the one that runs.
MAX_HEAD_SIZE = 128
# Lengths of a backward pass must be even; multiples of 8 suit the loads of bfloat16.
_MULTIPLE = 8


def fits(head_size: int, dtype: DTypeLike) -> bool:
    """Whether there is a kernel."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= MAX_HEAD_SIZE


def attend(
    query: Float[Array, "b q h d"], key: Float[Array, "b k h d"], value: Float[Array, "b k h d"]
) -> Float[Array, "b q h d"]:
    """softmax(Q K^T / sqrt(d)) V of every head. Other lengths are padded, as the 77 tokens of a text are to 80."""
    batch, queries, keys = len(query), query.shape[1], key.shape[1]
    if queries % _MULTIPLE == keys % _MULTIPLE == 0:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    query, key, value = (_padded(x) for x in (query, key, value))
    lengths, of_keys = (jnp.full(batch, count, jnp.int32) for count in (queries, keys))
    out = jax.nn.dot_product_attention(
        query, key, value, implementation="cudnn", query_seq_lengths=lengths, key_value_seq_lengths=of_keys
    )
    return out[:, :queries]


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _MULTIPLE), (0, 0), (0, 0)))
