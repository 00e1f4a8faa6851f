"""Attention and the transformer blocks of the UNet. Token sequences are [B, L, C]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spo_jax.models.layers import group_norm
from spo_jax.models.lora import LoRADense

# Logits of one piece of attention and one sample: 5 MiB in float32. All heads of CLIP (16 x 257 x 257) and of a UNet's
# inner levels are one piece; 1,024 tokens and more are cut. The bound is a sample's, because what is traced has the
# batch of all devices: with 80 samples a device a piece takes 400 MiB.
MAX_LOGITS = 5 * 2**18


def multi_head_attention(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    num_heads: int,
    mask: Bool[Array, "1 1 q k"] | None = None,
) -> Float[Array, "b q c"]:
    """Scaled dot-product attention with a float32 softmax: the only place where a faster kernel would be chosen.

    Where the logits of all heads are more than ``MAX_LOGITS`` a sample, one head is computed at a time, and where one
    head's are, some of its queries at a time: the same sums, in a memory that does not grow with the picture. The way
    back computes a piece again. The batch, which is split over devices, is never cut.
    """

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], x.shape[1], num_heads, x.shape[2] // num_heads)

    query, key, value = split(query), split(key), split(value)
    if num_heads * query.shape[1] * key.shape[1] <= MAX_LOGITS:
        out = jax.nn.dot_product_attention(query, key, value, mask=mask)
    else:
        heads = tuple(jnp.moveaxis(x, 2, 0) for x in (query, key, value))
        out = _map(lambda qkv: _attend_in_pieces(qkv[0], qkv[1], qkv[2], mask), heads)
        out = jnp.moveaxis(out, 0, 2)
    return out.reshape(*out.shape[:2], -1)


def _attend_in_pieces(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Attention of one head, [B, L, d] each, over pieces of the queries whose logits stay below ``MAX_LOGITS``."""
    length, dtype = query.shape[1], query.dtype
    # A power of two, which divides the tokens of most feature maps and is what matrix units like.
    piece = 2 ** (max(MAX_LOGITS // key.shape[1], 1).bit_length() - 1)
    count = -(-length // piece)
    # Gradients of keys and values are summed over the pieces: in float32, not in the dtype of the network.
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)

    def attend(queries: jax.Array, mask: jax.Array | None) -> jax.Array:
        keys, values = (x.astype(dtype)[:, :, None] for x in (key, value))
        return jax.nn.dot_product_attention(queries[:, :, None], keys, values, mask=mask)[:, :, 0]

    if count == 1:
        return attend(query, mask)

    def pieces(x: jax.Array, axis: int) -> jax.Array:
        """Cuts ``axis`` and puts the pieces first; queries beyond the end are zeros, and dropped below."""
        x = jnp.pad(x, [(0, count * piece - length if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, piece, *x.shape[axis + 1 :]), axis, 0)

    out = _map(lambda xs: attend(*xs), (pieces(query, 1), None if mask is None else pieces(mask, 2)))
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], count * piece, -1)[:, :length]


def _map(function: Callable[[Any], jax.Array], xs: Any) -> jax.Array:
    """``lax.map`` that keeps only ``xs`` for the way back."""
    return jax.lax.map(jax.checkpoint(function, prevent_cse=False), xs)  # a loop's body needs no protection from CSE


class Attention(nn.Module):
    """Self-attention, or cross-attention when ``context`` is given. The four projections carry the adapters."""

    num_heads: int
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b q c"], context: Float[Array, "b k d"] | None = None) -> Float[Array, "b q c"]:
        channels = x.shape[-1]
        context = x if context is None else context
        query = LoRADense(channels, self.use_bias, self.dtype, name="to_q")(x)
        key = LoRADense(channels, self.use_bias, self.dtype, name="to_k")(context)
        value = LoRADense(channels, self.use_bias, self.dtype, name="to_v")(context)
        out = multi_head_attention(query, key, value, self.num_heads)
        return LoRADense(channels, True, self.dtype, name="to_out_0")(out)


class GEGLU(nn.Module):
    """Gated linear unit with an exact GELU gate (arXiv 2002.05202)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b f"]:
        hidden, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return hidden * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then back."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        hidden = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a layer norm."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"], context: Float[Array, "b k d"]) -> Float[Array, "b l c"]:
        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)

        x = x + Attention(self.num_heads, dtype=self.dtype, name="attn1")(norm("norm1")(x))
        x = x + Attention(self.num_heads, dtype=self.dtype, name="attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual connection around all of them.

    ``use_linear_projection`` (SD2.1, SDXL) projects after flattening with a dense layer, SD1.5 before with a 1x1
    convolution: the same numbers in another parameter shape. ``remat`` computes each block again on the way back.
    """

    num_heads: int
    num_layers: int
    num_groups: int
    use_linear_projection: bool
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b k d"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape

        def project(name: str):
            if self.use_linear_projection:
                return nn.Dense(channels, dtype=self.dtype, name=name)
            return nn.Conv(channels, (1, 1), dtype=self.dtype, name=name)

        hidden = project("proj_in")(group_norm(self.num_groups, 1e-6, self.dtype, "norm")(x))
        hidden = hidden.reshape(batch, height * width, channels)
        Block = nn.remat(BasicTransformerBlock) if self.remat else BasicTransformerBlock
        for i in range(self.num_layers):
            hidden = Block(self.num_heads, self.dtype, name=f"transformer_blocks_{i}")(hidden, context)
        return x + project("proj_out")(hidden.reshape(x.shape))
