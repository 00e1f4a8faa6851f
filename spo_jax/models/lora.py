"""Low-rank adapters (LoRA, arXiv 2106.09685) of dense and convolution layers.

Adapters live in their own collection ``"lora"`` at the module path of the layer they adapt, so that
``unet.apply({"params": base, "lora": adapters}, ...)`` is the policy and ``unet.apply({"params": base}, ...)`` the
reference: one copy of the base weights serves both. A layer's are ``{"A": [in, r], "B": [r, out]}``, those of a
convolution ``{"A": [h, w, in, r], "B": [r, out]}``; see ``layers.Dense`` and ``layers.Conv``. The scale alpha / r is
part of ``B``.
"""

from __future__ import annotations

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from spo_jax import rng

# The layers that get fresh adapters.
TARGETS = ("to_q", "to_k", "to_v", "to_out_0")


def init_lora(key: jax.Array, params: PyTree, rank: int) -> PyTree:
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


def merge_lora(params: PyTree, lora: PyTree) -> PyTree:
    """Parameters of the network that needs no adapters any more: ``W + A B``, summed in float32.

    Args:
      params: of a UNet or a text encoder; float32 ones, because another dtype would round small updates away.
      lora: adapters of some of its layers.

    Returns:
      A tree like ``params``, whose adapted kernels are float32 NumPy arrays; everything else is the same object.
    """
    merged, adapters = flax.traverse_util.flatten_dict(params), flax.traverse_util.flatten_dict(lora)
    for path, a in adapters.items():
        if path[-1] == "A":
            kernel, b = (*path[:-1], "kernel"), adapters[(*path[:-1], "B")]
            merged[kernel] = np.asarray(merged[kernel], np.float32) + np.asarray(a) @ np.asarray(b)
    return flax.traverse_util.unflatten_dict(merged)
