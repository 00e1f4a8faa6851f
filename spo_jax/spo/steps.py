"""What is done with a batch of prompts: encoding, the pool, and the updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from spo_jax.data.prompts import batch_indices
from spo_jax.distributed.offload import to_device
from spo_jax.runs.state import TrainState
from spo_jax.sampling.encode import shard_prompts, tokens_of
from spo_jax.spo.assemble import SPO, sampler
from spo_jax.spo.rollout import Rollout
from spo_jax.spo.update import UpdateMetrics
from spo_jax.types import Pool, PromptBatch


def next_prompts(spo: SPO, batch: int) -> PromptBatch:
    """The prompts of the ``batch``-th batch since the start of training, encoded and split over the devices."""
    config = spo.config
    indices = batch_indices(len(spo.prompts), config.prompts_per_batch, config.seed, batch)
    return shard_prompts(encode_texts(spo, [spo.prompts[i] for i in indices]), spo.mesh)


def encode_texts(spo: SPO, texts: Sequence[str]) -> PromptBatch:
    """Encodes any number of prompts, ``config.prompts_per_batch`` at a time; all devices have the result."""
    params = to_device(spo.text_params)

    def encode(some: list[str]) -> PromptBatch:
        return spo.programs["encode"](params, *tokens_of(spo.pipeline, spo.tokenizer, some))

    pieces = list(in_pieces(encode, texts, spo.config.prompts_per_batch))
    if len(pieces) == 1:
        return pieces[0]
    rows = [(piece.embeddings, piece.scorer_text, piece.added) for piece in pieces]
    embeddings, scorer_text, added = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    return pieces[0].replace(embeddings=embeddings, scorer_text=scorer_text, added=added)


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


def in_pieces(function: Callable[[list[str]], PyTree], texts: Sequence[str], size: int) -> Iterator[PyTree]:
    """``function`` of ``size`` texts at a time, so that one program serves any number of them.

    The last piece is filled up with texts from the start, and its result cut; arrays whose first axis is not ``size``
    (those of the negative prompt) stay as they are.
    """
    for start in range(0, len(texts), size):
        result = function([texts[i % len(texts)] for i in range(start, start + size)])
        left = len(texts) - start
        yield result if left >= size else jax.tree.map(lambda x, left=left: x[:left] if len(x) == size else x, result)
