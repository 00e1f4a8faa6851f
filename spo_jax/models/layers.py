"""Convolutional building blocks shared by the UNet and the autoencoder. Images and feature maps are [B, H, W, C]."""

from __future__ import annotations

import functools
import math
import operator
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
    if learns[0] and any(learns[1:]):
        # Its transpose is a barrier between the gradients; what does not learn has none, and stays out.
        together = iter(jax.lax.optimization_barrier([leaf for leaf, one in zip(leaves, learns, strict=True) if one]))
        leaves = [next(together) if one else leaf for leaf, one in zip(leaves, learns, strict=True)]
    return primals, jax.tree.unflatten(tree, leaves)


def call(parent: nn.Module, layer: nn.Module, name: str, *args: Any, remat: bool = False) -> Any:
    """``layer(*args)`` with the weights that ``parent`` has by the name; layers alike are traced once for all of them.

    Networks repeat few layers often, a ViT-H one of them 32 times, SDXL's UNet one 60 times, and to trace them is most
    of the time before a program is compiled. Compilers put the calls in line.

    Args:
      parent: the module that runs.
      layer: one without parent or name; layers of equal fields, shapes and dtypes are alike. It may not draw random
        numbers, nor change variables; where intermediates are captured, each layer is traced.
      name: of its weights.
      *args: arrays, or None.
      remat: compute what is inside it again on the way back instead of keeping it.
    """
    if parent.is_mutable_collection("intermediates") and not parent.is_initializing():
        return layer.clone(parent=parent, name=name)(*args)
    if parent.is_initializing():
        parent.param(name, functools.partial(_init, layer), *args)
    given = {kind: of[name] for kind, of in parent.variables.items() if name in of}
    return _call(layer, remat, given, *args)


@functools.partial(jax.jit, static_argnums=0)
def _init(layer: nn.Module, key: jax.Array, *args: Any) -> Any:
    return layer.init(key, *args)["params"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(layer: nn.Module, remat: bool, variables: Any, *args: Any) -> Any:
    apply = jax.checkpoint(layer.apply) if remat else layer.apply
    return apply(variables, *args)


def _weights(layer: nn.Module, **declared: tuple[Callable[..., jax.Array], tuple[int, ...]]) -> dict[str, jax.Array]:
    """The weights of ``layer``: made in ``init`` from (initializer, shape), afterwards those that ``apply`` was given.

    ``layer.param`` would trace the initializer at every call, for its shape: a fifth of the time to trace a UNet.
    """
    if layer.is_initializing():
        return {name: layer.param(name, init, shape, jnp.float32) for name, (init, shape) in declared.items()}
    given = layer.variables["params"]
    return {name: given[name] for name in declared}


def _kernel_and_bias(layer: Any, init: Callable[..., jax.Array], shape: tuple[int, ...]) -> dict[str, jax.Array]:
    if not layer.use_bias:
        return _weights(layer, kernel=(init, shape))
    return _weights(layer, kernel=(init, shape), bias=(nn.initializers.zeros, shape[-1:]))


def _scale_and_bias(layer: nn.Module, channels: int) -> dict[str, jax.Array]:
    return _weights(layer, scale=(nn.initializers.ones, (channels,)), bias=(nn.initializers.zeros, (channels,)))


def low_rank(
    x: Float[Array, "*b i"], a: jax.Array, b: Float[Array, "r o"], down: Callable[..., jax.Array] = operator.matmul
) -> Float[Array, "*b o"]:
    """``down(x, A) B`` in float32, of inputs in any dtype; ``A`` is [i, r], or the kernel of a convolution."""
    x, (a, b) = tied(x, (a, b))
    return down(x.astype(jnp.float32), a) @ b


def _adapted(
    layer: Any, x: jax.Array, y: jax.Array, down: Callable[..., jax.Array] = operator.matmul
) -> Float[Array, "*b o"]:
    """``y`` and, where the collection ``"lora"`` has matrices for the layer, what they make of ``x``.

    Folding ``A B`` into a bfloat16 kernel would round small updates away, so it is never done in training.
    """
    if not layer.has_variable("lora", "A"):
        return y
    a, b = (gathered(layer.get_variable("lora", name)) for name in "AB")
    return (y.astype(jnp.float32) + low_rank(x, a, b, down)).astype(layer.dtype)


class Dense(nn.Module):
    """``nn.Dense``, tied, whose kernel may be split over devices; with adapters ``x W + b + (x A) B``."""

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable[..., jax.Array] = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        inputs, given = tied(x, _kernel_and_bias(self, self.kernel_init, (x.shape[-1], self.features)))
        y = inputs.astype(self.dtype) @ gathered(given["kernel"].astype(self.dtype))
        y = y + given["bias"].astype(self.dtype) if self.use_bias else y
        return _adapted(self, x, y)


class Conv(nn.Module):
    """``nn.Conv`` of pictures, tied, whose kernel may be split over devices.

    Of its adapters ``A`` [h, w, i, r] is a convolution with the layer's strides and padding, ``B`` [r, o] a 1x1 one.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        inputs, given = tied(x, _kernel_and_bias(self, nn.linear.default_kernel_init, shape))
        convolve = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(self.strides, self.strides),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = convolve(inputs.astype(self.dtype), gathered(given["kernel"].astype(self.dtype)))
        y = y + given["bias"].astype(self.dtype) if self.use_bias else y
        return _adapted(self, x, y, convolve)


class GroupNorm(nn.Module):
    """``nn.GroupNorm`` of pictures, tied, with statistics in two passes, as PyTorch computes them; in float32."""

    num_groups: int
    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        size, rest = divmod(x.shape[-1], self.num_groups)
        if rest:
            raise ValueError(f"{self.num_groups} groups do not divide {x.shape[-1]} channels")
        x, given = tied(x, _scale_and_bias(self, x.shape[-1]))
        mean, variance = _moments(x.reshape(*x.shape[:-1], self.num_groups, size), (1, 2, 4))
        mean, variance = (jnp.repeat(moment, size, axis=-1)[:, None, None] for moment in (mean, variance))
        return _normalized(self, x, mean, variance, given)


class LayerNorm(nn.Module):
    """``nn.LayerNorm``, tied, with statistics in two passes, as PyTorch computes them; in float32."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        x, given = tied(x, _scale_and_bias(self, x.shape[-1]))
        mean, variance = _moments(x, (x.ndim - 1,))
        return _normalized(self, x, mean[..., None], variance[..., None], given)


def _moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over ``axes``, float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(axes)
    return mean, jnp.square(x - jnp.expand_dims(mean, axes)).mean(axes)


def _normalized(layer: Any, x: jax.Array, mean: jax.Array, variance: jax.Array, given: dict) -> jax.Array:
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
        """``size`` is the result's where a side is odd, and so one less than the double: that of the skip it meets."""
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        if size is not None and x.shape[1:3] != size:
            x = x[:, : size[0], : size[1]]  # nearest neighbours of an odd size are those of the even one above it
        return conv3x3(self.channels, self.dtype, "conv")(x)


def activation(name: str):
    """The activation functions of CLIP configs, by their transformers name."""
    return {
        "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    }[name]
