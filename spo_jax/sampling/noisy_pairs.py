"""What a step-aware preference model is shown: both pictures of a pair as the base model sees them at a timestep.

SPO, section 3.2: both pictures get the same noise, and the frozen base model predicts the clean pictures in one guided
step. Everything here is a function of its arguments; no gradient flows into the frozen networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from spo_jax import rng
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.process import predict_x0_and_noise
from spo_jax.diffusion.schedule import Schedule
from spo_jax.distributed.mesh import jit_on, replicated
from spo_jax.distributed.pieces import map_in_pieces
from spo_jax.formats.pipeline import Pipeline
from spo_jax.preference.scorers import Scorer
from spo_jax.sampling.generate import make_decode
from spo_jax.types import JudgedPairs, PromptBatch


def make_predict_clean(
    pipeline: Pipeline, schedule: Schedule, guidance_scale: float, chunk: int = 0
) -> Callable[..., jax.Array]:
    """``predict_clean(params, images, prompts, timesteps, keys) -> float32 [B, 2, H, W, 3]``, about in [-1, 1].

    Args:
      pipeline: the base model.
      schedule: its noise schedule; the number of sampling steps plays no part.
      guidance_scale: w of classifier-free guidance.
      chunk: pairs that go through autoencoder and UNet at a time, a divisor of B and a multiple of the number of
        devices; 0 for all of them. The numbers are the same.

    Returns:
      A function of ``params`` (``"unet"``, ``"vae"``), images uint8 [B, 2, H, W, 3], ``prompts`` of B rows, timesteps
      int32 [B], and a key for each pair [B], so that a pair's noise does not depend on the batch that it is in.
    """
    predict_guided = make_guided_prediction(pipeline.unet.apply, guidance_scale)
    decode = make_decode(pipeline)
    vae = pipeline.vae

    def encode(params: Any, images: jax.Array, keys: jax.Array) -> jax.Array:
        """Latents [B, 2, h, w, c] sampled from the autoencoder's posterior."""
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        flat = pixels.reshape(-1, *pixels.shape[2:])
        mean, log_variance = vae.apply({"params": params["vae"]}, flat, method=vae.encode)
        mean, log_variance = (x.astype(jnp.float32).reshape(-1, 2, *x.shape[1:]) for x in (mean, log_variance))
        noise = jax.vmap(lambda key: jax.random.normal(rng.stream(key, "posterior"), mean.shape[1:]))(keys)
        return (mean + jnp.exp(0.5 * log_variance) * noise) * vae.scaling_factor

    def predict_together(
        params: Any,
        images: UInt8[Array, "b 2 H W 3"],
        prompts: PromptBatch,
        timesteps: Int[Array, " b"],
        keys: jax.Array,
    ) -> Float[Array, "b 2 H W 3"]:
        latents = encode(params, images, keys)
        noise = jax.vmap(lambda key: jax.random.normal(rng.stream(key, "noise"), latents.shape[2:]))(keys)
        alpha = schedule.alphas_cumprod[timesteps][:, None, None, None, None]
        noisy = jnp.sqrt(alpha) * latents + jnp.sqrt(1.0 - alpha) * noise[:, None]
        flat = noisy.reshape(-1, *noisy.shape[2:])
        times = jnp.repeat(timesteps, 2)
        both = prompts.map_rows(lambda rows: jnp.repeat(rows, 2, axis=0))
        output = predict_guided({"params": params["unet"]}, flat, times, *both.conditions)
        x0, _ = jax.vmap(lambda o, x, t: predict_x0_and_noise(schedule, o, x, t))(output, flat, times)
        clean = decode(params, x0)
        return clean.reshape(-1, 2, *clean.shape[1:])

    def predict_clean(params: Any, images: jax.Array, prompts: PromptBatch, timesteps: jax.Array, keys: jax.Array):
        def some(rows: tuple[Any, ...]) -> jax.Array:
            images, (embeddings, added), timesteps, keys = rows
            some_prompts = dataclasses.replace(prompts, embeddings=embeddings, added=added)
            return predict_together(params, images, some_prompts, timesteps, keys)

        rows = (images, (prompts.embeddings, prompts.added), timesteps, keys)
        return jax.lax.stop_gradient(map_in_pieces(some, rows, chunk or len(images)))

    return predict_clean


def score_pairs(
    scorer: Scorer, params: Any, images: Float[Array, "b 2 H W 3"], text: Any, timesteps: Int[Array, " b"]
) -> Float[Array, "b 2"]:
    """Scores of both pictures of each pair; ``text`` [b, ...] is what ``scorer.encode_text`` gave of the captions."""
    flat = images.reshape(-1, *images.shape[2:])
    scores = scorer.score(params, flat, jnp.repeat(text, 2, axis=0), jnp.repeat(timesteps, 2))
    return scores.reshape(-1, 2)


def pair_keys(root: jax.Array, positions: Int[Array, " b"]) -> jax.Array:
    """A key for each pair, by its place in the stream of records: the same in any batch and on any device."""
    return jax.vmap(lambda position: jax.random.fold_in(root, position))(positions)


def make_look(
    encode: Callable[..., PromptBatch], predict_clean: Callable[..., jax.Array], scorer: Scorer, mesh: Mesh
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """``look(frozen, params, pairs, timestep, key) -> (images [B, 2, H, W, 3], scores [B, 2])``, compiled."""

    def look(frozen: Any, params: Any, pairs: JudgedPairs, timestep: jax.Array, key: jax.Array):
        timesteps = jnp.full((len(pairs.images),), timestep)
        prompts, keys = encode(frozen, pairs.tokens), pair_keys(key, pairs.positions)
        clean = predict_clean(frozen, pairs.images, prompts, timesteps, keys)
        return clean, score_pairs(scorer, params, clean, scorer.encode_text(params, pairs.scorer_tokens), timesteps)

    return jit_on(mesh, look, out_shardings=replicated(mesh))
