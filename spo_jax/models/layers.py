"""Convolutional building blocks shared by the UNet and the autoencoder. Images and feature maps are [B, H, W, C]."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from spo_jax.distributed.sharding import gathered


def product(of: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``of(x, kernel)``, linear in both, with a kernel that may be split over devices.

    Where the kernel learns, its gradient is made before that of ``x`` goes on. Nothing else waits for it but the
    optimizer, so that XLA would leave it for the end of a program, and keep the inputs of all layers until then.
    """
    return _product(of, x, gathered(kernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(of: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    return of(x, kernel)


def _forward(of: Any, x: Any, kernel: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    learns = () if kernel.perturbed else None  # what is kept is a tree of arrays; its structure may say more
    return of(x.value, kernel.value), (x.value, kernel.value, learns)


def _backward(of: Any, kept: tuple[Any, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, kernel, learns = kept
    (to_x,) = jax.linear_transpose(lambda x: of(x, kernel), x)(gradient)
    if learns is None:
        return to_x, None
    (to_kernel,) = jax.linear_transpose(lambda kernel: of(x, kernel), kernel)(gradient)
    return jax.lax.optimization_barrier((to_x, to_kernel))


_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _dot(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return product(lambda x, kernel: jax.lax.dot_general(x, kernel, *args, **kwargs), x, kernel)


def _convolve(x: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    return product(lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, *args, **kwargs), x, kernel)


class Dense(nn.Dense):
    """``nn.Dense`` whose kernel may be split over devices."""

    dot_general: Any = _dot


class Conv(nn.Conv):
    """``nn.Conv`` whose kernel may be split over devices."""

    conv_general_dilated: Any = _convolve


def timestep_embedding(
    timesteps: Num[Array, " b"], dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Float[Array, "b dim"]:
    """Sinusoidal embedding of ``timesteps`` (DDPM, section B); float32. ``flip_sin_to_cos`` puts the cosines first."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    halves = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(halves, axis=-1), ((0, 0), (0, dim % 2)))


def group_norm(num_groups: int, epsilon: float, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    """Group normalisation with two-pass float32 statistics, as PyTorch computes them."""
    return nn.GroupNorm(num_groups=num_groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


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
