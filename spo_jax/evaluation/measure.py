"""Evidence: base and tuned model on held-out prompts, from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spo_jax import rng
from spo_jax.diffusion.schedule import Schedule
from spo_jax.distributed.mesh import batch_sharding, jit_on, replicated, round_up
from spo_jax.distributed.pieces import map_in_pieces, piece_size
from spo_jax.evaluation.colorfulness import colorfulness
from spo_jax.formats.pipeline import Pipeline
from spo_jax.preference.scorers import Scorer
from spo_jax.sampling.encode import shard_prompts
from spo_jax.sampling.generate import make_decode, make_sample
from spo_jax.types import PromptBatch


@flax.struct.dataclass
class Measured:
    """One model on n prompts: images [n, H, W, 3] in [-1, 1] and, for each, the three measures as float32/bool [n]."""

    images: np.ndarray
    preference_score: np.ndarray
    colorfulness: np.ndarray
    alignment_top1: np.ndarray


def make_measure_batch(
    pipeline: Pipeline,
    scorer: Scorer,
    judge: Scorer,
    schedule: Schedule,
    mesh: Mesh,
    *,
    guidance_scale: float,
    eta: float,
    chunk: int,
) -> Callable[..., tuple[jax.Array, ...]]:
    """``measure_batch(params, variables, prompts, judge_text [n, E], key, numbers int32 [B])``.

    The program behind ``make_measure``, of B of the n prompts with their numbers. It gives images [B, H, W, 3],
    preference scores, colourfulness, and the nearest of the n captions, [B] each.
    """
    sample_latents = make_sample(pipeline, schedule, guidance_scale=guidance_scale, eta=eta)
    decode = make_decode(pipeline)
    shape = pipeline.latent_shape

    def measure_batch(params, variables, prompts: PromptBatch, judge_text, key, numbers):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
        initial = jax.vmap(lambda k: jax.random.normal(rng.stream(k, "initial"), shape))(keys)
        noise = None
        if eta > 0:
            noise = jax.vmap(lambda k: jax.random.normal(rng.stream(k, "steps"), (schedule.num_steps, *shape)))(keys)
            noise = jnp.swapaxes(noise, 0, 1)

        def look(rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            latents, scorer_text = rows
            images = jnp.clip(decode(params, latents), -1.0, 1.0)
            count = len(images)
            zeros = jnp.zeros((count,), jnp.int32)
            scores = scorer.score(params["scorer"], images, scorer_text, zeros)
            similarity = jax.vmap(
                lambda text: judge.score(params["judge"], images, jnp.broadcast_to(text, (count, len(text))), zeros)
            )(judge_text)
            return images, scores, colorfulness(images), similarity.argmax(axis=0)

        latents = sample_latents(variables, prompts, initial, noise)
        return map_in_pieces(look, (latents, prompts.scorer_text), piece_size(len(numbers), mesh.size, chunk))

    return measure_batch


def make_measure(
    pipeline: Pipeline,
    scorer: Scorer,
    judge: Scorer,
    schedule: Schedule,
    mesh: Mesh,
    *,
    guidance_scale: float,
    eta: float,
    batch_size: int,
    chunk: int = 0,
) -> Callable[..., Measured]:
    """``measure(params, trained, prompts, judge_text [n, E], key) -> Measured``.

    Args:
      pipeline: models and tokenizer.
      scorer: the preference model, asked at timestep 0.
      judge: a plain CLIP; alignment is whether a picture's own caption is the nearest of all n.
      schedule: sampling steps.
      mesh: the devices, which split the pictures; all processes get all results.
      guidance_scale: as in training.
      eta: DDIM's; 0 for the deterministic sampler.
      batch_size: pictures at a time, over all devices together; rounded up to a multiple of their number.
      chunk: pictures that a device decodes and judges at a time, at most; 0 for its share of the batch.

    Returns:
      A function of the UNet's trained variables (see ``TrainState``; ``programs.untrained`` makes those of the base
      model). The same key gives the same noise to each prompt, whatever the model and the batch size.
    """
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "eta": eta, "chunk": chunk}
    measure_batch = make_measure_batch(pipeline, scorer, judge, schedule, mesh, **options)
    one_batch = jit_on(mesh, measure_batch, out_shardings=replicated(mesh))
    batch_size = round_up(batch_size, mesh.size)

    def measure(params: Any, trained: Any, prompts: PromptBatch, judge_text: jax.Array, key: jax.Array) -> Measured:
        count = prompts.embeddings.shape[0]
        variables = {"params": params["unet"], **trained}
        results = []
        for start in range(0, count, batch_size):
            # The last batch is filled up with prompts from the start, so that one program serves all.
            rows = np.arange(start, start + batch_size, dtype=np.int32) % count
            batch = shard_prompts(prompts.map_rows(itemgetter(rows)), mesh)
            numbers = jax.device_put(rows, batch_sharding(mesh))
            outputs = jax.device_get(one_batch(params, variables, batch, judge_text, key, numbers))
            results.append([values[: count - start] for values in outputs])
        images, scores, colors, nearest = (np.concatenate(column) for column in zip(*results, strict=True))
        return Measured(images, scores, colors, nearest == np.arange(count))

    return measure


def summarize(base: Measured, tuned: Measured) -> dict[str, Any]:
    """Means of both models, the base model's spread over prompts, and how often the tuned one wins."""
    names = ("preference_score", "colorfulness", "alignment_top1")

    def means(measured: Measured) -> dict[str, float]:
        return {name: float(np.mean(getattr(measured, name))) for name in names}

    return {
        "base": means(base),
        "tuned": means(tuned),
        "base_std": {name: float(np.std(getattr(base, name))) for name in names[:2]},
        "win_rate": float(np.mean(tuned.colorfulness > base.colorfulness)),
        "win_rate_preference_score": float(np.mean(tuned.preference_score > base.preference_score)),
        "num_prompts": len(base.colorfulness),
    }
