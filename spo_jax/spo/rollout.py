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
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.pool import draw_pool_noise, sample_pool
from spo_jax.diffusion.schedule import Schedule
from spo_jax.distributed.mesh import batch_sharding, constrain_batch, jit_on
from spo_jax.distributed.pieces import map_in_pieces, piece_size
from spo_jax.formats.pipeline import Pipeline
from spo_jax.preference.pairs import make_pairs
from spo_jax.preference.scorers import Scorer
from spo_jax.sampling.generate import make_decode
from spo_jax.types import PoolNoise, PreferencePairs, PromptBatch


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
