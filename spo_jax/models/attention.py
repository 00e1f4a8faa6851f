"""Attention and the transformer blocks of the UNet. Token sequences are [B, L, C]."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from spo_jax.models.compiler import call
from spo_jax.models.layers import Conv, Dense, GroupNorm, LayerNorm

# Most logits of a sample computed at once: 5 MiB in float32. All heads of CLIP (16 x 257 x 257) and of a UNet's
# inner levels stay below it; attention over 1,024 tokens and more is cut into pieces. The bound counts one sample,
# because a traced shape has the batch of all devices: with 80 samples on a device a piece takes 400 MiB.
MAX_LOGITS = 5 * 2**18


def multi_head_attention(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    num_heads: int,
    mask: Bool[Array, "1 1 q k"] | None = None,
) -> Float[Array, "b q c"]:
    """Scaled dot-product attention with a float32 softmax: the only place where a faster kernel would be chosen.

    Where the logits of all heads are more than ``MAX_LOGITS`` a sample, some queries of one head are computed at a
    time: the same sums, in a memory that does not grow with the image. The backward pass computes each piece again.
    The batch is split over devices and never cut. Attention with a mask (CLIP's, over few tokens) is not cut either.
    """
    query, key, value = (x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads) for x in (query, key, value))
    if mask is not None or num_heads * query.shape[1] * key.shape[1] <= MAX_LOGITS:
        out = jax.nn.dot_product_attention(query, key, value, mask=mask)
    else:
        query, key, value = (jnp.moveaxis(x, 2, 0) for x in (query, key, value))
        length = query.shape[2]
        query = jnp.pad(query, ((0, 0), (0, 0), (0, -length % _rows_of_piece(query, key)), (0, 0)))
        out = jnp.moveaxis(_attend_in_pieces(query, key, value)[:, :, :length], 0, 2)
    return out.reshape(*out.shape[:2], -1)


def _rows_of_piece(query: jax.Array, key: jax.Array) -> int:
    """Queries of a piece: a power of two, which divides most feature maps and suits matrix units."""
    return min(query.shape[2], 2 ** (max(MAX_LOGITS // key.shape[2], 1).bit_length() - 1))


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of one head, [B, L, d] each."""
    return jax.nn.dot_product_attention(query[:, :, None], key[:, :, None], value[:, :, None])[:, :, 0]


# The loops write their results over what they have read for the last time. ``lax.map`` would start from zeros, which
# XLA on a GPU makes for all layers of a network in one kernel at the start: all results would stay in memory.
@jax.custom_vjp
def _attend_in_pieces(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of all heads, [h, B, L, d] each, with ``_rows_of_piece`` queries of one head at a time."""
    rows = _rows_of_piece(query, key)
    count = query.shape[2] // rows

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        head, start = i // count, i % count * rows
        return _put(out, _attend(_take(out, head, start, rows), key[head], value[head]), head, start)

    return jax.lax.fori_loop(0, len(query) * count, step, query)


def _forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _attend_in_pieces(query, key, value), (query, key, value)


def _backward(inputs: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = inputs
    rows = _rows_of_piece(query, key)

    def of_head(head: jax.Array, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_query, d_key, d_value = grads  # for this head they still hold the cotangent, the key and the value
        key, value = d_key[head], d_value[head]

        def of_piece(i: jax.Array, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_query, *sums = grads
            _, pull_back = jax.vjp(_attend, _take(query, head, i * rows, rows), key, value)
            d_piece, *more = pull_back(_take(d_query, head, i * rows, rows))
            return _put(d_query, d_piece, head, i * rows), *(a + b for a, b in zip(sums, more, strict=True))

        # Gradients of keys and values are summed over the pieces in float32, not in the dtype of the network.
        zeros = jnp.zeros(key.shape, jnp.float32)
        d_query, *sums = jax.lax.fori_loop(0, query.shape[2] // rows, of_piece, (d_query, zeros, zeros))
        return d_query, d_key.at[head].set(sums[0].astype(key.dtype)), d_value.at[head].set(sums[1].astype(key.dtype))

    return jax.lax.fori_loop(0, len(query), of_head, (cotangent, key, value))


_attend_in_pieces.defvjp(_forward, _backward)


def _take(x: jax.Array, head: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    """Some queries of one head, [B, rows, d], out of [h, B, L, d]."""
    return jax.lax.dynamic_slice(x, (head, 0, start, 0), (1, x.shape[1], rows, x.shape[3]))[0]


def _put(x: jax.Array, piece: jax.Array, head: jax.Array, start: jax.Array) -> jax.Array:
    """``x`` with another piece there."""
    return jax.lax.dynamic_update_slice(x, piece[None], (head, 0, start, 0))


class Attention(nn.Module):
    """Self-attention, or cross-attention when ``context`` is given. Fresh adapters are on the four projections."""

    num_heads: int
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b q c"], context: Float[Array, "b k d"] | None = None) -> Float[Array, "b q c"]:
        channels = x.shape[-1]
        context = x if context is None else context
        query = Dense(channels, self.use_bias, self.dtype, name="to_q")(x)
        key = Dense(channels, self.use_bias, self.dtype, name="to_k")(context)
        value = Dense(channels, self.use_bias, self.dtype, name="to_v")(context)
        out = multi_head_attention(query, key, value, self.num_heads)
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

    @nn.compact
    def __call__(self, x: Float[Array, "b l c"], context: Float[Array, "b k d"]) -> Float[Array, "b l c"]:
        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        x = x + Attention(self.num_heads, dtype=self.dtype, name="attn1")(norm("norm1")(x))
        x = x + Attention(self.num_heads, dtype=self.dtype, name="attn2")(norm("norm2")(x), context)
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

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b k d"]) -> Float[Array, "b h w c"]:
        batch, height, width, channels = x.shape

        def project(name: str) -> Dense | Conv:
            if self.use_linear_projection:
                return Dense(channels, dtype=self.dtype, name=name)
            return Conv(channels, (1, 1), dtype=self.dtype, name=name)

        hidden = project("proj_in")(GroupNorm(self.num_groups, 1e-6, self.dtype, name="norm")(x))
        hidden = hidden.reshape(batch, height * width, channels)
        block = BasicTransformerBlock(self.num_heads, self.dtype, parent=None)
        for i in range(self.num_layers):
            hidden = call(self, block, f"transformer_blocks_{i}", hidden, context, remat=self.remat)
        return x + project("proj_out")(hidden.reshape(x.shape))
