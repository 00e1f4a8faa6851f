"""What is done with a batch of prompts: encoding, the pool, and the updates."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spo_jax.data.prompts import batch_indices
from spo_jax.runs.held_out import encode_texts
from spo_jax.runs.state import TrainState
from spo_jax.sampling.encode import shard_prompts
from spo_jax.spo.assemble import SPO, sampler
from spo_jax.spo.rollout import Rollout
from spo_jax.spo.update import UpdateMetrics
from spo_jax.types import Pool, PromptBatch


def next_prompts(spo: SPO, batch: int) -> PromptBatch:
    """The prompts of the ``batch``-th batch since the start of training, encoded and split over the devices."""
    config = spo.config
    indices = batch_indices(len(spo.prompts), config.prompts_per_batch, config.seed, batch)
    return shard_prompts(encode_texts(spo, [spo.prompts[i] for i in indices]), spo.mesh)


def draw(spo: SPO, state: TrainState, prompts: PromptBatch, key: jax.Array) -> Pool:
    """Samples the pools of a batch of prompts."""
    return spo.programs["pool"](spo.pool_params, sampler(spo, state), prompts, key)


def collect(spo: SPO, pool: Pool, prompts: PromptBatch, key: jax.Array) -> tuple[Rollout, int]:
    """Scores pools and orders their pairs; also the number of valid pairs, on the host."""
    pairs, scores = spo.programs["score"](spo.score_params, pool, prompts.scorer_text, key)
    rollout = Rollout(pairs, *spo.programs["arrange"](key, pairs.valid, scores))
    return rollout, int(rollout.num_valid)


def run_updates(
    spo: SPO, state: TrainState, prompts: PromptBatch, rollout: Rollout, num_valid: int
) -> tuple[TrainState, list[UpdateMetrics]]:
    """One update for each minibatch of valid pairs; none if no pair is valid."""
    updates = []
    for start in range(0, num_valid, spo.config.train.minibatch_size):
        minibatch = spo.programs["exchange"](prompts, rollout.pairs, rollout.order, rollout.num_valid, jnp.int32(start))
        state, metrics = spo.programs["update"](state, spo.params["unet"], *minibatch)
        updates.append(metrics)
    return state, jax.device_get(updates)
