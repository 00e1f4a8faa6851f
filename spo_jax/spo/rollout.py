"""Pools of a batch of prompts: one program samples them, another one scores them and makes pairs."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.pool import PoolOptions, draw_pool, draw_pool_noise, score_pool
from spo_jax.diffusion.process import Process
from spo_jax.distributed.mesh import constrain_batch
from spo_jax.errors import UserError
from spo_jax.formats.pipeline import Pipeline
from spo_jax.preference.pairs import ALL, constant_threshold, draw_two, make_pairs
from spo_jax.preference.scorers import Scorer
from spo_jax.types import Candidates, Pool, PoolNoise, PreferencePairs, PromptBatch


@flax.struct.dataclass
class Rollout:
    """Pairs [S, B] of one batch of prompts, the valid ones first in ``order``; mean and deviation of all scores."""

    pairs: PreferencePairs
    order: jax.Array
    num_valid: jax.Array
    score_mean: jax.Array
    score_std: jax.Array


# ``(params, trained, prompts, key) -> pool``; everything of a prompt stays on its device.
MakePool = Callable[[dict[str, PyTree], PyTree, PromptBatch, jax.Array], Pool]
# ``(params, pool, text of the prompts, key) -> (pairs [S, B, ...], scores [E, B, k])``.
ScorePool = Callable[[dict[str, PyTree], Pool, jax.Array, jax.Array], tuple[PreferencePairs, jax.Array]]


def make_draw_pool(config: ConfigDict, pipeline: Pipeline, scorer: Scorer, process: Process, mesh: Mesh) -> MakePool:
    """The program that samples the pools of a batch of prompts, without scores."""
    predict_guided = make_guided_prediction(pipeline.unet.apply, config.sampling.guidance_scale)
    sampling = config.sampling
    options = PoolOptions(sampling.num_plain_steps, sampling.num_inner_steps, sampling.eta, sampling.continuation)

    def pool(params: dict[str, PyTree], trained: PyTree, prompts: PromptBatch, key: jax.Array) -> Pool:
        batch_size = prompts.embeddings.shape[0]
        noise = draw_pool_noise(
            rng.stream(key, "pool"),
            batch_size,
            pipeline.latent_shape,
            num_steps=sampling.num_steps,
            num_plain_steps=sampling.num_plain_steps,
            num_candidates=sampling.num_candidates,
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
            return predict_guided(variables, flat, timesteps, repeated).reshape(latents.shape)

        def score(candidates: Candidates) -> jax.Array:
            assert prompts.scorer_text is not None
            return scorer.score(params, candidates, prompts.scorer_text)

        return draw_pool(predict, process, noise, options, score)

    return pool


def make_score_pool(config: ConfigDict, scorer: Scorer) -> ScorePool:
    """The program that scores pools and makes pairs of them; the key is used where pairs are drawn at random."""
    threshold, timesteps = constant_threshold(config.pairs.threshold), used_timesteps(config)

    def score(
        params: dict[str, PyTree], pool: Pool, text: jax.Array, key: jax.Array
    ) -> tuple[PreferencePairs, jax.Array]:
        scored = score_pool(lambda candidates: scorer.score(params, candidates, text), pool)
        assert scored.scores is not None
        compared = None
        if config.pairs.kind == "random":
            *shape, num_candidates = scored.scores.shape
            compared = draw_two(rng.stream(key, "pairs"), tuple(shape), num_candidates)
        return make_pairs(scored, threshold, compared, timesteps), scored.scores

    return score


def used_timesteps(config: ConfigDict) -> tuple[int, int]:
    """The timesteps, from the first up to the second, of the pairs that are used; the key's default is all."""
    low, high = config.pairs.timesteps
    return ALL if (low, high) == (0, 1000) else (low, high)


def num_used_steps(config: ConfigDict, process: Process) -> int:
    """At how many of the N - d pool steps a pair may be used.

    Raises:
      UserError: at none.
    """
    low, high = used_timesteps(config)
    drawn = np.asarray(process.timesteps)[config.sampling.num_plain_steps :]
    if not (count := int(((drawn >= low) & (drawn < high)).sum())):
        raise UserError(
            f"config.pairs.timesteps = {(low, high)} holds none of the timesteps that candidates are drawn from, "
            f"{', '.join(map(str, drawn))}; widen it."
        )
    return count


def make_sample_pool(config: ConfigDict, pipeline: Pipeline, scorer: Scorer, process: Process, mesh: Mesh) -> MakePool:
    """Pools of a batch of prompts with their scores, in one program."""
    draw = make_draw_pool(config, pipeline, scorer, process, mesh)

    def sample(params: dict[str, PyTree], trained: PyTree, prompts: PromptBatch, key: jax.Array) -> Pool:
        pool = draw(params, trained, prompts, key)
        assert prompts.scorer_text is not None
        text = prompts.scorer_text
        return score_pool(lambda candidates: scorer.score(params, candidates, text), pool)

    return sample


def rollout_metrics(rollout: Rollout, num_valid: int) -> dict[str, float]:
    """What is logged of a sampling phase."""
    return {
        "preference_score_mean": float(rollout.score_mean),
        "preference_score_std": float(rollout.score_std),
        "num_pairs": num_valid,
        "valid_fraction": num_valid / rollout.order.shape[0],
    }
