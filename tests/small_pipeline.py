"""A pipeline whose UNet has one level: for programs on many devices, which take long to compile."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from spo_jax.checkpoints.pipeline import Pipeline, read_pipeline
from spo_jax.emoji import resolve
from spo_jax.models import UNet2DConditionModel

ONE_LEVEL = {
    "block_out_channels": [64],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
}


def small_pipeline(sharding) -> Pipeline:
    """The emoji models, but for a UNet of one level with random weights, each where ``sharding(path, shape)`` says."""
    pipeline = read_pipeline(resolve("emoji:model"), sharding=sharding)
    fields = json.loads((resolve("emoji:model") / "unet" / "config.json").read_text(encoding="utf-8"))
    unet = UNet2DConditionModel.from_config(fields | ONE_LEVEL)
    context = jnp.zeros((1, 1, fields["cross_attention_dim"]))
    shapes = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, *pipeline.latent_shape)), jnp.zeros(1), context)
    generator, params = np.random.default_rng(0), {}
    for path, x in flatten_dict(shapes["params"]).items():
        value = generator.standard_normal(x.shape, np.float32) / np.sqrt(np.prod(x.shape[:-1]))
        value = {"kernel": value, "bias": 0 * value, "scale": 1 + 0 * value}[path[-1]]
        params[path] = jax.device_put(value, sharding(("unet", *path), x.shape))
    return dataclasses.replace(pipeline, unet=unet, params=pipeline.params | {"unet": unflatten_dict(params)})
