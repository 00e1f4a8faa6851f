"""The network that a ``config.json`` describes, and the shapes of its parameters."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError, first_line
from spo_jax.formats.json_files import Json
from spo_jax.formats.weights import DIFFUSERS_STEM, TRANSFORMERS_STEM
from spo_jax.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ImageReward,
    UNet2DConditionModel,
)
from spo_jax.types import AddedConditions


class Part(NamedTuple):
    """A part of a pipeline: its class, the library that has the class, and how the names of its weight files begin."""

    model: type[nn.Module]
    library: str
    stem: str


PARTS = {
    "unet": Part(UNet2DConditionModel, "diffusers", DIFFUSERS_STEM),
    "vae": Part(AutoencoderKL, "diffusers", DIFFUSERS_STEM),
    "text_encoder": Part(CLIPTextModel, "transformers", TRANSFORMERS_STEM),
    "text_encoder_2": Part(CLIPTextModelWithProjection, "transformers", TRANSFORMERS_STEM),  # SDXL only
}


def build(
    model: type[nn.Module], config: Json, dtype: DTypeLike, *, where: str, **options: Hashable
) -> tuple[nn.Module, PyTree]:
    """The network of class ``model`` that a ``config.json`` describes, and the shapes of its parameters, in ``dtype``.

    ``where`` names the config in messages, such as the UserError if a field is not supported, or its values make no
    model; ``options`` are those of ``model.from_config``.
    """
    try:
        return _built(model.from_config, json.dumps(config), jnp.dtype(dtype), **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: its values make no model ({first_line(error)}); download or copy it again."
        ) from error


@functools.lru_cache(maxsize=16)  # tracing takes seconds, and a plan asks again for each estimate
def _built(
    from_config: Callable[..., nn.Module], config: str, dtype: np.dtype, **options: Hashable
) -> tuple[nn.Module, PyTree]:
    network = from_config(json.loads(config), dtype=dtype, **options)
    return network, network_shapes(network, dtype)


def network_shapes(network: nn.Module, dtype: DTypeLike = jnp.float32) -> PyTree:
    """A tree of ``jax.ShapeDtypeStruct`` for the parameters of one of the networks that are imported here."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    inputs: tuple[jax.Array | AddedConditions | None, ...]
    match network:
        case UNet2DConditionModel():
            size, added = 2 ** (len(network.block_out_channels) - 1), None
            if network.pooled_dim is not None:
                added = AddedConditions(pooled=jnp.zeros((1, network.pooled_dim)), time_ids=jnp.zeros((1, 6)))
            latents = jnp.zeros((1, size, size, network.in_channels))
            inputs = (latents, jnp.zeros(1), jnp.zeros((1, 1, network.cross_attention_dim)), added)
        case AutoencoderKL():
            inputs = (jnp.zeros((1, network.downscale, network.downscale, network.in_channels)),)
        case CLIPModel():
            pixels = jnp.zeros((1, network.image_size, network.image_size, 3))
            inputs = (pixels, tokens, jnp.zeros(1)) if network.step_aware else (pixels, tokens)
        case ImageReward():
            size = network.sizes.image_size
            inputs = (jnp.zeros((1, size, size, 3)), tokens, tokens == 0)
        case _:
            inputs = (tokens,)
    shapes = jax.eval_shape(lambda *a: network.init(jax.random.key(0), *a), *inputs)["params"]
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)
