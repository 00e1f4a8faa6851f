"""From prompts and noise to images: the plain samplers and the decoder, as one function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from spo_jax.diffusion.ddim import sample
from spo_jax.diffusion.dpm_solver import sample_dpmpp_2m
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import Schedule
from spo_jax.formats.pipeline import Pipeline
from spo_jax.types import PromptBatch

# ``decode(params, latents [n, h, w, c]) -> images [n, H, W, 3]``, about in [-1, 1], float32; reads ``params["vae"]``.
Decode = Callable[[dict[str, PyTree], jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled; solver "dpmpp_2m" goes with a schedule of its own and knows no ``eta``."""

    guidance_scale: float
    eta: float = 0.0
    solver: str = "ddim"


# ``(variables of the UNet, prompts, x_T, noise of the N steps or None) -> latents [B, h, w, c]``.
SampleLatents = Callable[[PyTree, PromptBatch, jax.Array, jax.Array | None], jax.Array]


# The same with the parameters before it, of which it reads ``"vae"``: images [B, H, W, 3].
Generate = Callable[[dict[str, PyTree], PyTree, PromptBatch, jax.Array, jax.Array | None], jax.Array]


def make_decode(pipeline: Pipeline) -> Decode:
    """The decoder of a pipeline's autoencoder."""
    vae = pipeline.vae

    def decode(params: dict[str, PyTree], latents: jax.Array) -> jax.Array:
        images = vae.apply({"params": params["vae"]}, latents / vae.scaling_factor, method=vae.decode)
        return images.astype(jnp.float32)

    return decode


def make_sample(pipeline: Pipeline, schedule: Schedule, options: SamplingOptions) -> SampleLatents:
    """The sampler of a pipeline.

    The UNet's variables are ``{"params": ...}``, with ``"lora"`` for a tuned model. The noise may be None if eta is 0.
    """
    predict_guided = make_guided_prediction(pipeline.unet.apply, options.guidance_scale)

    def sample_latents(
        variables: PyTree,
        prompts: PromptBatch,
        initial: Float[Array, "b h w c"],
        noise: Float[Array, "n b h w c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        def predict(latents: jax.Array, timestep: jax.Array) -> jax.Array:
            return predict_guided(variables, latents, jnp.full((latents.shape[0],), timestep), prompts)

        if options.solver == "dpmpp_2m":
            return sample_dpmpp_2m(predict, schedule, initial)
        return sample(predict, schedule, initial, noise, eta=options.eta)

    return sample_latents


def make_generate(pipeline: Pipeline, schedule: Schedule, options: SamplingOptions) -> Generate:
    """Sampler and decoder of a pipeline."""
    sample_latents, decode = make_sample(pipeline, schedule, options), make_decode(pipeline)

    def generate(
        params: dict[str, PyTree],
        variables: PyTree,
        prompts: PromptBatch,
        initial: jax.Array,
        noise: jax.Array | None = None,
    ) -> jax.Array:
        return decode(params, sample_latents(variables, prompts, initial, noise))

    return generate
