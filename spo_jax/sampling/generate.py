"""From prompts and noise to pictures: the plain sampler and the decoder, as one program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spo_jax.diffusion.ddim import sample
from spo_jax.diffusion.dpm_solver import sample_dpmpp_2m
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import Schedule
from spo_jax.formats.pipeline import Pipeline


def make_decode(pipeline: Pipeline) -> Callable[[Any, jax.Array], jax.Array]:
    """``decode(params, latents [n, h, w, c]) -> images [n, H, W, 3]``, about in [-1, 1], float32."""
    vae = pipeline.vae

    def decode(params: Any, latents: jax.Array) -> jax.Array:
        images = vae.apply({"params": params["vae"]}, latents / vae.scaling_factor, method=vae.decode)
        return images.astype(jnp.float32)

    return decode


def make_sample(
    pipeline: Pipeline, schedule: Schedule, *, guidance_scale: float, eta: float, solver: str = "ddim"
) -> Callable[..., jax.Array]:
    """``sample_latents(variables, prompts, initial, noise) -> latents [B, h, w, c]``.

    ``variables`` are the UNet's: ``{"params": ...}``, with ``"lora"`` for a tuned model. ``noise`` [N, B, h, w, c] may
    be None when ``eta`` is 0. ``solver`` "dpmpp_2m" goes with a schedule of its own and knows no ``eta``.
    """
    predict_guided = make_guided_prediction(pipeline.unet.apply, guidance_scale)

    def sample_latents(variables, prompts, initial, noise=None):
        def predict(latents, timestep):
            timesteps = jnp.full((latents.shape[0],), timestep)
            return predict_guided(variables, latents, timesteps, *prompts.conditions)

        if solver == "dpmpp_2m":
            return sample_dpmpp_2m(predict, schedule, initial)
        return sample(predict, schedule, initial, noise, eta=eta)

    return sample_latents


def make_generate(pipeline: Pipeline, schedule: Schedule, **options: Any) -> Callable[..., jax.Array]:
    """``generate(params, variables, prompts, initial, noise) -> images [B, H, W, 3]``; see ``make_sample``."""
    sample_latents, decode = make_sample(pipeline, schedule, **options), make_decode(pipeline)

    def generate(params, variables, prompts, initial, noise=None):
        return decode(params, sample_latents(variables, prompts, initial, noise))

    return generate
