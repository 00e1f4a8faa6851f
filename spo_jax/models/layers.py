"""Layers that the networks share. Images and feature maps are [B, H, W, C], token sequences [B, L, C].

The weights of a layer, when they learn, are ``tied`` to its input, and may be split over devices (``gathered``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Num

from spo_jax.distributed.sharding import gathered
from spo_jax.models.compiler import tied, weights

Product = Callable[[jax.Array, jax.Array], jax.Array]  # of inputs and a kernel


def low_rank(
    x: Float[Array, "... i"], a: jax.Array, b: Float[Array, "r o"], product: Product = operator.matmul
) -> Float[Array, "... o"]:
    """``product(x, A) B`` in float32, of inputs in any dtype; ``A`` is [i, r], or the kernel of a convolution."""
    x, (a, b) = tied(x, (a, b))
    return product(x.astype(jnp.float32), a) @ b


def _affine(layer: Dense | Conv, x: jax.Array, product: Product, shape: tuple[int, ...]) -> jax.Array:
    """``product(x, W) + b`` with a kernel of ``shape``, and ``product(x, A) B`` where ``"lora"`` has the matrices.

    Folding ``A B`` into a bfloat16 kernel would round small updates away, so training never does it.
    """
    bias = {"bias": (nn.initializers.zeros, shape[-1:])} if layer.use_bias else {}
    inputs, given = tied(x, weights(layer, kernel=(layer.kernel_init, shape), **bias))
    y = product(inputs.astype(layer.dtype), gathered(given["kernel"].astype(layer.dtype)))
    y = y + given["bias"].astype(layer.dtype) if layer.use_bias else y
    if not layer.has_variable("lora", "A"):
        return y
    a, b = (gathered(layer.get_variable("lora", name)) for name in "AB")
    return (y.astype(jnp.float32) + low_rank(x, a, b, product)).astype(layer.dtype)


class Dense(nn.Module):
    """``nn.Dense``; with adapters ``x W + b + (x A) B``."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return _affine(self, x, operator.matmul, (x.shape[-1], self.features))


class Conv(nn.Module):
    """``nn.Conv`` of images.

    Of its adapters ``A`` [h, w, i, r] is a convolution with the layer's strides and padding, ``B`` [r, o] a 1x1 one.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        def convolve(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
            if self.kernel_size == (1, 1) and self.strides == 1 and not any(map(any, self.padding)):
                return inputs @ kernel[0, 0]  # on a CPU convolutions of one pixel are slow
            strides, names = (self.strides, self.strides), ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(inputs, kernel, strides, self.padding, dimension_numbers=names)

        return _affine(self, x, convolve, (*self.kernel_size, x.shape[-1], self.features))


class GroupNorm(nn.Module):
    """``nn.GroupNorm`` of images."""

    num_groups: int
    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        size, rest = divmod(x.shape[-1], self.num_groups)
        if rest:
            raise ValueError(f"{self.num_groups} groups do not divide {x.shape[-1]} channels")
        x, given = _with_scale_and_bias(self, x)

        def mean_of(values: jax.Array) -> jax.Array:
            """Of each group. Pixels are summed first, by channel: a sum over few channels at a time is slow."""
            of_groups = values.mean((1, 2)).reshape(len(x), self.num_groups, size).mean(-1)
            return jnp.repeat(of_groups, size, axis=-1)[:, None, None]

        as_float = x.astype(jnp.float32)
        mean = mean_of(as_float)
        return _normalized(self, x, mean, mean_of(jnp.square(as_float - mean)), given)


class LayerNorm(nn.Module):
    """``nn.LayerNorm``."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        x, given = _with_scale_and_bias(self, x)
        as_float = x.astype(jnp.float32)
        mean = as_float.mean(-1, keepdims=True)
        return _normalized(self, x, mean, jnp.square(as_float - mean).mean(-1, keepdims=True), given)


def _with_scale_and_bias(layer: nn.Module, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    channels = x.shape[-1:]
    return tied(x, weights(layer, scale=(nn.initializers.ones, channels), bias=(nn.initializers.zeros, channels)))


def _normalized(
    layer: GroupNorm | LayerNorm, x: jax.Array, mean: jax.Array, variance: jax.Array, given: dict[str, jax.Array]
) -> jax.Array:
    """With mean and variance in float32, which are taken in two passes as in PyTorch."""
    y = (x - mean) * (jax.lax.rsqrt(variance + layer.epsilon) * given["scale"]) + given["bias"]
    return y.astype(layer.dtype)


def timestep_embedding(
    timesteps: Num[Array, " b"], dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Float[Array, "b dim"]:
    """Sinusoidal embedding of ``timesteps`` (DDPM, section B); float32. ``flip_sin_to_cos`` puts the cosines first."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    halves = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(halves, axis=-1), ((0, 0), (0, dim % 2)))


def conv3x3(channels: int, dtype: jnp.dtype, name: str, stride: int = 1) -> Conv:
    """3x3 convolution with PyTorch's ``padding=1`` (flax's SAME pads a strided convolution on one side only)."""
    return Conv(channels, (3, 3), stride, ((1, 1), (1, 1)), dtype=dtype, name=name)


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
        h = nn.silu(GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm1")(x))
        h = conv3x3(self.channels, self.dtype, "conv1")(h)
        if time is not None:
            shift = Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))
            h = h + shift[:, None, None, :]
        h = nn.silu(GroupNorm(self.num_groups, self.epsilon, self.dtype, name="norm2")(h))
        h = conv3x3(self.channels, self.dtype, "conv2")(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, (1, 1), dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample2D(nn.Module):
    """Halves height and width, rounding up. The autoencoder pads below and to the right only, the UNet all around."""

    channels: int
    asymmetric: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        padding = ((0, 1), (0, 1)) if self.asymmetric else ((1, 1), (1, 1))
        return Conv(self.channels, (3, 3), 2, padding, dtype=self.dtype, name="conv")(x)


class Upsample2D(nn.Module):
    """Doubles height and width by nearest neighbour, then convolves."""

    channels: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        """``size``: of the skip that the result meets; a side that is odd is one less than the double."""
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        if size is not None and x.shape[1:3] != size:
            x = x[:, : size[0], : size[1]]  # the nearest neighbours are those of the next even size
        return conv3x3(self.channels, self.dtype, "conv")(x)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation functions of CLIP configs, by their transformers name."""
    return {
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    }[name]
