"""Low-rank adapters (LoRA, arXiv 2106.09685) inside the attention projections.

Adapters live in their own collection ``"lora"`` at the module path of the layer they adapt, so that
``unet.apply({"params": base, "lora": adapters}, ...)`` is the policy and ``unet.apply({"params": base}, ...)`` the
reference: one copy of the base weights serves both. The scale alpha / r is part of ``B``.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from spo_jax import rng
from spo_jax.distributed.sharding import gathered
from spo_jax.models.layers import Dense, tied

TARGETS = ("to_q", "to_k", "to_v", "to_out_0")


class LoRADense(Dense):
    """``y = x W + b + (x A) B``; the last term in float32, and only where the collection ``"lora"`` has it.

    Folding ``A B`` into a bfloat16 ``W`` would round small updates away, so it is never done in training.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = super().__call__(x)
        if self.has_variable("lora", "A"):
            adapters = (gathered(self.get_variable("lora", name)) for name in "AB")
            y = (y.astype(jnp.float32) + low_rank(x, *adapters)).astype(self.dtype)
        return y


def low_rank(x: Float[Array, "*b i"], a: Float[Array, "i r"], b: Float[Array, "r o"]) -> Float[Array, "*b o"]:
    """``(x A) B`` in float32, of inputs in any dtype."""
    x, (a, b) = tied(x, (a, b))
    return (x.astype(jnp.float32) @ a) @ b


def init_lora(key: jax.Array, params: Any, rank: int) -> Any:
    """Fresh adapters for every attention projection of ``params``: A ~ N(0, 1/rank^2), B = 0, float32.

    Args:
      key: PRNG key. Each layer draws from a stream of its own name, so the order of layers does not matter.
      params: UNet parameters (only names and shapes are read).
      rank: inner dimension r >= 1.

    Returns:
      A nested dict ``{..., "to_q": {"A": [in, rank], "B": [rank, out]}, ...}``.
    """
    lora = {}
    for path, value in flax.traverse_util.flatten_dict(params).items():
        if path[-1] == "kernel" and path[-2] in TARGETS:
            fan_in, fan_out = value.shape
            layer_key = rng.stream(key, "/".join(path[:-1]))
            lora[(*path[:-1], "A")] = jax.random.normal(layer_key, (fan_in, rank), jnp.float32) / rank
            lora[(*path[:-1], "B")] = jnp.zeros((rank, fan_out), jnp.float32)
    return flax.traverse_util.unflatten_dict(lora)


def merge_lora(params: Any, lora: Any) -> Any:
    """Parameters of the network that needs no adapters any more: ``W + A B``, summed in float32.

    Args:
      params: UNet parameters; float32 ones, because in another dtype small updates have been rounded away before.
      lora: tree of ``{"A": [in, r], "B": [r, out]}`` on some of its layers.

    Returns:
      A tree like ``params``, whose adapted kernels are float32 NumPy arrays; everything else is the same object.
    """
    merged, adapters = flax.traverse_util.flatten_dict(params), flax.traverse_util.flatten_dict(lora)
    for path, a in adapters.items():
        if path[-1] == "A":
            kernel, b = (*path[:-1], "kernel"), adapters[(*path[:-1], "B")]
            merged[kernel] = np.asarray(merged[kernel], np.float32) + np.asarray(a) @ np.asarray(b)
    return flax.traverse_util.unflatten_dict(merged)
