"""Attention and the transformer blocks of the UNet. Token sequences are [B, L, C]."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.kernels.attention import multi_head_attention
from spo_jax.models.compiler import call
from spo_jax.models.layers import Conv, Dense, GroupNorm, LayerNorm


class Attention(nn.Module):
    """Self-attention, or cross-attention when ``context`` is given. Fresh adapters are on the four projections."""

    num_heads: int
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    kind: str = "auto"  # of ``kernels.attention.KINDS``

    @nn.compact
    def __call__(self, x: Float[Array, "b q c"], context: Float[Array, "b k d"] | None = None) -> Float[Array, "b q c"]:
        channels = x.shape[-1]
        context = x if context is None else context
        query = Dense(channels, self.use_bias, self.dtype, name="to_q")(x)
        key = Dense(channels, self.use_bias, self.dtype, name="to_k")(context)
        value = Dense(channels, self.use_bias, self.dtype, name="to_v")(context)
        out = multi_head_attention(query, key, value, self.num_heads, kind=self.kind)
        return Dense(channels, True, self.dtype, name="to_out_0")(out)


class GEGLU(nn.Module):
    """Gated linear unit with an exact GELU gate (arXiv 2002.05202)."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b f"]:
        hidden, gate = jnp.split(Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return hidden * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU of four times the width, then back."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        hidden = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a layer norm."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"], context: Float[Array, "b k d"]) -> Float[Array, "b l c"]:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        def attention(name: str) -> Attention:
            return Attention(self.num_heads, dtype=self.dtype, kind=self.attention, name=name)

        x = x + attention("attn1")(norm("norm1")(x))
        x = x + attention("attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm("norm3")(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual connection around all of them.

    ``use_linear_projection`` (SD2.1, SDXL) projects after flattening with a dense layer, SD1.5 before with a 1x1
    convolution: the same numbers in another parameter shape. ``remat`` recomputes each block in the backward pass.
    """

    num_heads: int
    num_layers: int
    num_groups: int
    use_linear_projection: bool
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    attention: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b k d"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape

        def project(name: str) -> Dense | Conv:
            if self.use_linear_projection:
                return Dense(channels, dtype=self.dtype, name=name)
            return Conv(channels, (1, 1), dtype=self.dtype, name=name)

        hidden = project("proj_in")(GroupNorm(self.num_groups, 1e-6, self.dtype, name="norm")(x))
        hidden = hidden.reshape(batch, height * width, channels)
        block = BasicTransformerBlock(self.num_heads, self.dtype, self.attention, parent=None)
        for i in range(self.num_layers):
            hidden = call(self, block, f"transformer_blocks_{i}", hidden, context, remat=self.remat)
        return x + project("proj_out")(hidden.reshape(x.shape))
