"""Splash attention, JAX's Pallas kernel for TPUs, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The largest block of queries and of keys by chip, as JAX names it. A block of logits of 512 x 1024 takes 2 MiB of the
# 16 MiB that a kernel has on a v5e or v5p (32 MiB on a v6e). Chosen by memory: speeds were not measured.
BLOCKS = {"TPU v5 lite": (512, 1024), "TPU v5": (512, 1024), "TPU v6 lite": (1024, 1024), "TPU7x": (1024, 1024)}
OTHER_BLOCKS = (512, 512)
MAX_HEAD_SIZE = 256  # a block of queries and one of keys and values, in float32, stay below 4 MiB
_MULTIPLE = 128  # of lengths: the width of a TPU's registers


def attend(
    query: Float[Array, "b q h d"],
    key: Float[Array, "b k h d"],
    value: Float[Array, "b k h d"],
    *,
    chip: str = "",
    interpret: bool = False,
) -> Float[Array, "b q h d"]:
    """softmax(Q K^T / sqrt(d)) V of every head.

    Args:
      query: and ``key``, ``value``; lengths are padded to multiples of 128.
      chip: the TPU that it is compiled for, a key of ``BLOCKS``.
      interpret: computes the kernel step by step on any platform, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
    query, key, value = (jnp.swapaxes(_padded(x), 1, 2) for x in (query, key, value))
    rows, columns = query.shape[2], key.shape[2]
    of_queries, of_keys = (
        max(size for size in range(_MULTIPLE, most + 1, _MULTIPLE) if length % size == 0)
        for length, most in zip((rows, columns), BLOCKS.get(chip, OTHER_BLOCKS), strict=True)
    )
    sizes = splash.BlockSizes(
        block_q=of_queries,
        block_kv=of_keys,
        block_kv_compute=of_keys,
        block_q_dkv=of_queries,
        block_kv_dkv=of_keys,
        block_kv_dkv_compute=of_keys,
        block_q_dq=of_queries,
        block_kv_dq=of_keys,
    )
    mask = masks.MultiHeadMask([masks.FullMask((rows, columns))] * heads)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    # Queries look only at keys of their own segment, so nobody looks at those that only fill up.
    segments = None
    if columns > keys:
        segments = splash.SegmentIds(jnp.zeros(rows, jnp.int32), (jnp.arange(columns) >= keys).astype(jnp.int32))
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(query, key, value)
    return jnp.swapaxes(out, 1, 2)[:, :queries]


def _padded(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % _MULTIPLE), (0, 0), (0, 0)))
