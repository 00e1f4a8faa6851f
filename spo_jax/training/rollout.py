"""The compiled programs of a sampling phase: text to embeddings, embeddings to pool to pairs, and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.checkpoints.pipeline import Pipeline
from spo_jax.diffusion.dpm_solver import sample_dpmpp_2m
from spo_jax.diffusion.generate import sample
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.pool import draw_pool_noise, sample_pool
from spo_jax.diffusion.schedule import Schedule
from spo_jax.distributed.mesh import batch_sharding, constrain_batch, jit_on, replicated
from spo_jax.distributed.pieces import map_in_pieces, piece_size
from spo_jax.preference.pairs import make_pairs
from spo_jax.preference.scorers import Scorer
from spo_jax.types import AddedConditions, PoolNoise, PreferencePairs, PromptBatch


@flax.struct.dataclass
class Rollout:
    """Pairs [S, B] of one batch of prompts, the valid ones first in ``order``; mean and deviation of all scores."""

    pairs: PreferencePairs
    order: jax.Array
    num_valid: jax.Array
    score_mean: jax.Array
    score_std: jax.Array


def rollout_metrics(rollout: Rollout, num_valid: int) -> dict[str, float]:
    """What is logged of a sampling phase."""
    return {
        "preference_score_mean": float(rollout.score_mean),
        "preference_score_std": float(rollout.score_std),
        "num_pairs": num_valid,
        "valid_fraction": num_valid / rollout.order.shape[0],
    }


def make_encode(pipeline: Pipeline, scorer: Scorer | None) -> Callable[..., PromptBatch]:
    """``encode(params, tokens, negative_tokens, scorer_tokens [B, L'] or None) -> PromptBatch``.

    ``tokens`` and ``negative_tokens`` hold int32 [B, L] and [1, L] for each text encoder of the pipeline. Without
    negative tokens (None) the negative embeddings are zeros. Without a scorer there are no scorer tokens and no text.
    ``params`` may have adapters of text encoders, ``{"lora": {"text_encoder": tree}}``.
    """

    def variables(params: Any, name: str) -> Any:
        adapters = params.get("lora", {}).get(name)
        return {"params": params[name]} | ({} if adapters is None else {"lora": adapters})

    def embed(params: Any, tokens: tuple[jax.Array, ...]) -> tuple[jax.Array, AddedConditions | None]:
        first = pipeline.text_encoder.apply(variables(params, "text_encoder"), tokens[0])
        if pipeline.text_encoder_2 is None:
            return first.last_hidden_state, None
        second = pipeline.text_encoder_2.apply(variables(params, "text_encoder_2"), tokens[1])
        # SDXL takes the state before the last layer, and no final layer norm.
        hidden = jnp.concatenate([first.penultimate_hidden_state, second.penultimate_hidden_state], axis=-1)
        size = jnp.array(pipeline.image_size, jnp.float32)
        time_ids = jnp.concatenate([size, jnp.zeros(2), size])  # an uncropped picture of just this size
        return hidden, AddedConditions(second.pooled, jnp.broadcast_to(time_ids, (len(hidden), 6)))

    def encode(
        params: Any,
        tokens: tuple[jax.Array, ...],
        negative_tokens: tuple[jax.Array, ...] | None,
        scorer_tokens: Any,
    ) -> PromptBatch:
        embeddings, added = embed(params, tokens)
        if negative_tokens is not None:
            negative, negative_added = embed(params, negative_tokens)
        else:
            negative, negative_added = jax.tree.map(lambda x: x[:1], (jnp.zeros_like(embeddings), added))
            if negative_added is not None:  # the time ids stay, only the text is gone
                negative_added = negative_added.replace(pooled=jnp.zeros_like(negative_added.pooled))
        text: Any = None if scorer is None else scorer.encode_text(params["scorer"], scorer_tokens)
        return PromptBatch(embeddings, negative, text, added, negative_added)

    return encode


def shard_prompts(prompts: PromptBatch, mesh: Mesh) -> PromptBatch:
    """Splits a batch of prompts over the devices."""
    everywhere = jax.tree.map(lambda _: replicated(mesh), prompts)
    return jax.device_put(prompts, everywhere.map_rows(lambda _: batch_sharding(mesh)))


def make_decode(pipeline: Pipeline) -> Callable[[Any, jax.Array], jax.Array]:
    """``decode(params, latents [n, h, w, c]) -> images [n, H, W, 3]``, about in [-1, 1], float32."""
    vae = pipeline.vae

    def decode(params: Any, latents: jax.Array) -> jax.Array:
        images = vae.apply({"params": params["vae"]}, latents / vae.scaling_factor, method=vae.decode)
        return images.astype(jnp.float32)

    return decode


def make_score_latents(
    pipeline: Pipeline, scorer: Scorer, *, step_aware: bool, chunk: int = 0, num_devices: int = 1
) -> Callable[..., jax.Array]:
    """``score_latents(params, prompts, x0 [B, k, h, w, c], timestep scalar) -> float32 [B, k]``.

    Args:
      pipeline: its autoencoder decodes.
      scorer: the preference model.
      step_aware: False tells it t = 0 whatever the timestep is, as in the paper's ablation.
      chunk: pictures that a device decodes and scores at a time, at most; 0 for all of its pictures, which need more
        memory than anything else in sampling.
      num_devices: that split the B prompts.
    """
    decode = make_decode(pipeline)

    def score_latents(params: Any, prompts: PromptBatch, x0: jax.Array, timestep: jax.Array) -> jax.Array:
        def score(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            latents, text = rows
            timesteps = jnp.full((len(latents),), timestep if step_aware else 0)
            return scorer.score(params["scorer"], decode(params, latents), text, timesteps)

        batch, count = x0.shape[:2]
        rows = x0.reshape(batch * count, *x0.shape[2:]), jnp.repeat(prompts.scorer_text, count, axis=0)
        return map_in_pieces(score, rows, piece_size(batch * count, num_devices, chunk)).reshape(batch, count)

    return score_latents


def time_score(
    config: ConfigDict, pipeline: Pipeline, scorer: Scorer, params: Any, prompts: PromptBatch, mesh: Mesh
) -> float:
    """Seconds to decode and score one step's candidates, measured once by itself.

    Inside the pool, which is one program, the share of the scorer cannot be timed.
    """
    options = {"step_aware": config.scorer.step_aware, "chunk": config.scorer.chunk, "num_devices": mesh.size}
    score_latents = jit_on(mesh, make_score_latents(pipeline, scorer, **options))
    shape = (config.prompts_per_batch, config.sampling.num_candidates, *pipeline.latent_shape)
    x0 = jnp.zeros(shape, device=batch_sharding(mesh))
    score_latents(params, prompts, x0, jnp.int32(0)).block_until_ready()
    start = time.time()
    score_latents(params, prompts, x0, jnp.int32(0)).block_until_ready()
    return time.time() - start


def make_pool(
    config: ConfigDict, pipeline: Pipeline, scorer: Scorer, schedule: Schedule, mesh: Mesh
) -> Callable[..., tuple[PreferencePairs, jax.Array]]:
    """``pool(params, trained, prompts, key) -> (pairs [S, B, ...], scores [E, B, k])``: all of sampling in one program.

    Everything of a prompt stays on its device.
    """
    predict_guided = make_guided_prediction(pipeline.unet.apply, config.sampling.guidance_scale)
    options = {"step_aware": config.scorer.step_aware, "chunk": config.scorer.chunk, "num_devices": mesh.size}
    score_latents = make_score_latents(pipeline, scorer, **options)

    def pool(params: Any, trained: Any, prompts: PromptBatch, key: jax.Array) -> tuple[PreferencePairs, jax.Array]:
        batch_size = prompts.embeddings.shape[0]
        noise = draw_pool_noise(
            rng.stream(key, "pool"),
            batch_size,
            pipeline.latent_shape,
            num_steps=config.sampling.num_steps,
            num_plain_steps=config.sampling.num_plain_steps,
            num_candidates=config.sampling.num_candidates,
        )
        noise = PoolNoise(
            initial=constrain_batch(mesh, noise.initial),
            plain=constrain_batch(mesh, noise.plain, axis=1),
            candidates=constrain_batch(mesh, noise.candidates, axis=1),
            choices=constrain_batch(mesh, noise.choices, axis=1),
        )

        def predict(latents: jax.Array, timestep: jax.Array) -> jax.Array:
            count = latents.shape[1]
            flat = latents.reshape(batch_size * count, *latents.shape[2:])
            repeated = prompts.map_rows(lambda rows: jnp.repeat(rows, count, axis=0))
            timesteps = jnp.full((batch_size * count,), timestep)
            variables = {"params": params["unet"], **trained}
            output = predict_guided(variables, flat, timesteps, *repeated.conditions)
            return output.reshape(latents.shape)

        sampled = sample_pool(
            predict,
            lambda x0, timestep: score_latents(params, prompts, x0, timestep),
            schedule,
            noise,
            num_plain_steps=config.sampling.num_plain_steps,
            num_inner_steps=config.sampling.num_inner_steps,
            eta=config.sampling.eta,
            continuation=config.sampling.continuation,
        )
        return make_pairs(sampled, config.pairs.threshold), sampled.scores

    return pool


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
