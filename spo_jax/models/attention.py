"""Attention and the transformer blocks of the UNet. Token sequences are [B, L, C]."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spo_jax.models.layers import group_norm
from spo_jax.models.lora import LoRADense


def multi_head_attention(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    num_heads: int,
    mask: Bool[Array, "1 1 q k"] | None = None,
) -> Float[Array, "b q c"]:
    """Scaled dot-product attention with a float32 softmax: the only place where a faster kernel would be chosen."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], x.shape[1], num_heads, x.shape[2] // num_heads)

    out = jax.nn.dot_product_attention(split(query), split(key), split(value), mask=mask)
    return out.reshape(query.shape)


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
    convolution: the same numbers in another parameter shape.
    """

    num_heads: int
    num_layers: int
    num_groups: int
    use_linear_projection: bool
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
        for i in range(self.num_layers):
            hidden = BasicTransformerBlock(self.num_heads, self.dtype, name=f"transformer_blocks_{i}")(hidden, context)
        return x + project("proj_out")(hidden.reshape(x.shape))
