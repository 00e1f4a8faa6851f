"""Convolutional building blocks shared by the UNet and the autoencoder. Images and feature maps are [B, H, W, C]."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Num

from spo_jax.distributed.sharding import gathered


@jax.custom_jvp
def tied(x: Any, weights: Any) -> tuple[Any, Any]:
    """Both as they are; on the way back, gradients of ``weights`` that learn are made before that of ``x`` goes on.

    Nothing waits for a weight's gradient but the optimizer, so that XLA would leave it for the end of the program, and
    keep what it is made from, of all layers, until then (SD1.5 on a GPU: 5 GiB with adapters, 10 with all weights).
    """
    return x, weights


@functools.partial(tied.defjvp, symbolic_zeros=True)
def _tied_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    leaves, tree = jax.tree.flatten(tangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    learns = [not isinstance(leaf, SymbolicZero) for leaf in leaves]
    if any(learns[1:]):
        if not learns[0]:
            leaves[0] = jnp.zeros(leaves[0].shape, leaves[0].dtype)
        learns[0] = True
        # Its transpose is a barrier between the gradients; what does not learn has none, and stays out.
        together = iter(jax.lax.optimization_barrier([leaf for leaf, one in zip(leaves, learns, strict=True) if one]))
        leaves = [next(together) if one else leaf for leaf, one in zip(leaves, learns, strict=True)]
    return primals, jax.tree.unflatten(tree, leaves)


def _call(layer: nn.Module, call: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """``call``, of flax, with weights that are tied to ``x``."""
    if layer.is_initializing():
        return call(layer, x)
    x, params = tied(x, layer.variables["params"])
    return layer.clone(parent=None).apply({"params": params}, x, method=call)


def _dot(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return jax.lax.dot_general(x, gathered(kernel), *args, **kwargs)


def _convolve(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x, gathered(kernel), *args, **kwargs)


class Dense(nn.Dense):
    """``nn.Dense``, tied, whose kernel may be split over devices."""

    dot_general: Any = _dot

    def __call__(self, x: jax.Array) -> jax.Array:
        return _call(self, nn.Dense.__call__, x)


class Conv(nn.Conv):
    """``nn.Conv``, tied, whose kernel may be split over devices."""

    conv_general_dilated: Any = _convolve

    def __call__(self, x: jax.Array) -> jax.Array:
        return _call(self, nn.Conv.__call__, x)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``, tied."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return _call(self, nn.GroupNorm.__call__, x)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm``, tied."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return _call(self, nn.LayerNorm.__call__, x)


def timestep_embedding(
    timesteps: Num[Array, " b"], dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Float[Array, "b dim"]:
    """Sinusoidal embedding of ``timesteps`` (DDPM, section B); float32. ``flip_sin_to_cos`` puts the cosines first."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    halves = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(halves, axis=-1), ((0, 0), (0, dim % 2)))


def group_norm(num_groups: int, epsilon: float, dtype: jnp.dtype, name: str) -> GroupNorm:
    """Group normalisation with two-pass float32 statistics, as PyTorch computes them."""
    return GroupNorm(num_groups=num_groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def conv3x3(channels: int, dtype: jnp.dtype, name: str, stride: int = 1) -> Conv:
    """3x3 convolution with PyTorch's ``padding=1`` (flax's SAME pads a strided convolution on one side only)."""
    return Conv(channels, (3, 3), strides=stride, padding=1, dtype=dtype, name=name)


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear on the sinusoidal embedding."""

    dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b dim"]:
        x = Dense(self.dim, dtype=self.dtype, name="linear_1")(x)
        return Dense(self.dim, dtype=self.dtype, name="linear_2")(nn.silu(x))


class ResnetBlock2D(nn.Module):
    """Two normalised convolutions with a shortcut; the time embedding, if any, is added between them."""

    channels: int
    num_groups: int
    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], time: Float[Array, "b t"] | None = None) -> Float[Array, "b h w d"]:
        h = nn.silu(group_norm(self.num_groups, self.epsilon, self.dtype, "norm1")(x))
        h = conv3x3(self.channels, self.dtype, "conv1")(h)
        if time is not None:
            shift = Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))
            h = h + shift[:, None, None, :]
        h = nn.silu(group_norm(self.num_groups, self.epsilon, self.dtype, "norm2")(h))
        h = conv3x3(self.channels, self.dtype, "conv2")(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample2D(nn.Module):
    """Halves height and width. The autoencoder pads below and to the right only, the UNet on all sides."""

    channels: int
    asymmetric: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        padding = [(0, 1), (0, 1)] if self.asymmetric else [(1, 1), (1, 1)]
        return Conv(self.channels, (3, 3), strides=2, padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Doubles height and width by nearest neighbour, then convolves."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return conv3x3(self.channels, self.dtype, "conv")(x)


def activation(name: str):
    """The activation functions of CLIP configs, by their transformers name."""
    return {
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    }[name]
