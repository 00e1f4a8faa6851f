"""From prompts and noise to images: the plain samplers and the decoder, as one function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

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


class SampleLatents(Protocol):
    """A plain sampler of a pipeline's UNet."""

    def __call__(
        self,
        variables: PyTree,
        prompts: PromptBatch,
        initial: Float[Array, "b h w c"],
        noise: Float[Array, "n b h w c"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """Final latents.

        ``variables`` are the UNet's: ``{"params": ...}``, with ``"lora"`` for a tuned model. ``noise``, of N steps, may
        be None when ``eta`` is 0.
        """


class Generate(Protocol):
    """``SampleLatents`` and the decoder; ``params`` has ``"vae"``."""

    def __call__(
        self,
        params: dict[str, PyTree],
        variables: PyTree,
        prompts: PromptBatch,
        initial: Float[Array, "b h w c"],
        noise: Float[Array, "n b h w c"] | None = None,
    ) -> Float[Array, "b H W 3"]:
        """Images, about in [-1, 1]."""


def make_decode(pipeline: Pipeline) -> Decode:
    """The decoder of a pipeline's autoencoder."""
    vae = pipeline.vae

    def decode(params: dict[str, PyTree], latents: jax.Array) -> jax.Array:
        images = vae.apply({"params": params["vae"]}, latents / vae.scaling_factor, method=vae.decode)
        return images.astype(jnp.float32)

    return decode


def make_sample(pipeline: Pipeline, schedule: Schedule, options: SamplingOptions) -> SampleLatents:
    """The sampler of a pipeline."""
    predict_guided = make_guided_prediction(pipeline.unet.apply, options.guidance_scale)

    def sample_latents(
        variables: PyTree, prompts: PromptBatch, initial: jax.Array, noise: jax.Array | None = None
    ) -> jax.Array:
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
