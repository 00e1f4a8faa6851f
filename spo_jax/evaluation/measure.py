"""Base and tuned model on held-out prompts, from the same noise, by every metric that a config names."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from spo_jax import rng
from spo_jax.diffusion.schedule import Schedule
from spo_jax.distributed.mesh import batch_sharding, round_up
from spo_jax.distributed.pieces import map_in_pieces, piece_size
from spo_jax.evaluation.metrics import Described, Metric
from spo_jax.files import write_text
from spo_jax.formats.pipeline import Pipeline
from spo_jax.sampling.encode import shard_prompts
from spo_jax.sampling.generate import SamplingOptions, make_decode, make_sample
from spo_jax.types import PromptBatch

Texts = dict[str, jax.Array]  # of all N prompts, by metric; metrics that read no prompts have none


class Measured(NamedTuple):
    """One model on n prompts: images [n, H, W, 3] in [-1, 1], and scores [n] by metric."""

    images: np.ndarray
    scores: dict[str, np.ndarray]


# ``(params, UNet's variables, prompts, texts, key, numbers [B]) -> (images, scores [B] by metric)``.
MeasureBatch = Callable[
    [dict[str, PyTree], PyTree, PromptBatch, Texts, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]
]


def make_measure_batch(
    pipeline: Pipeline,
    schedule: Schedule,
    metrics: Mapping[str, Metric],
    mesh: Mesh,
    options: SamplingOptions,
    chunk: int,
) -> MeasureBatch:
    """The program of an evaluation.

    Args:
      pipeline: samples and decodes.
      schedule: sampling steps.
      metrics: by name.
      mesh: the devices, which split the images.
      options: of sampling.
      chunk: images that a device decodes and scores at a time, at most; 0 for its share of the batch.

    Returns:
      A function of B of the N prompts and their numbers, which with the key decide their noise.
    """
    sample_latents, decode = make_sample(pipeline, schedule, options), make_decode(pipeline)
    shape = pipeline.latent_shape

    def measure_batch(
        params: dict[str, PyTree],
        variables: PyTree,
        prompts: PromptBatch,
        texts: Texts,
        key: jax.Array,
        numbers: Int[Array, " b"],
    ) -> tuple[Float[Array, "b H W 3"], dict[str, jax.Array]]:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)
        initial = jax.vmap(lambda k: jax.random.normal(rng.stream(k, "initial"), shape))(keys)
        noise = None
        if options.eta > 0:
            noise = jax.vmap(lambda k: jax.random.normal(rng.stream(k, "steps"), (schedule.num_steps, *shape)))(keys)
            noise = jnp.swapaxes(noise, 0, 1)

        def look(rows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
            latents, some = rows
            images = jnp.clip(decode(params, latents), -1.0, 1.0)
            return images, {name: m.score(params, images, texts.get(name), some) for name, m in metrics.items()}

        latents = sample_latents(variables, prompts, initial, noise)
        return map_in_pieces(look, (latents, numbers), piece_size(len(numbers), mesh.size, chunk))

    return measure_batch


def measure(
    program: MeasureBatch,
    params: dict[str, PyTree],
    trained: PyTree,
    held_out: tuple[PromptBatch, Texts],
    key: jax.Array,
    *,
    batch_size: int,
    mesh: Mesh,
) -> Measured:
    """One model on all held-out prompts.

    Args:
      program: compiled, see ``make_measure_batch``.
      params: frozen parameters by part, of the UNet, the autoencoder and what the metrics read.
      trained: the UNet's trained variables (see ``TrainState``; ``untrained`` makes those of the base model).
      held_out: n prompts, encoded, and the metrics' texts of at least those.
      key: the same one gives the same noise to each prompt, whatever the model and the batch size.
      batch_size: images at a time, over all devices together; rounded up to a multiple of their number.
      mesh: the devices; all processes get all results.
    """
    prompts, texts = held_out
    count, batch_size = prompts.embeddings.shape[0], round_up(batch_size, mesh.size)
    variables = {"params": params["unet"], **trained}
    results = []
    for start in range(0, count, batch_size):
        # The last batch is filled up with prompts from the start, so that one program serves all.
        rows = np.arange(start, start + batch_size, dtype=np.int32) % count
        batch = shard_prompts(prompts.map_rows(itemgetter(rows)), mesh)
        numbers = jax.device_put(rows, batch_sharding(mesh))
        outputs = jax.device_get(program(params, variables, batch, texts, key, numbers))
        results.append(jax.tree.map(itemgetter(slice(count - start)), outputs))
    return Measured(*jax.tree.map(lambda *parts: np.concatenate(parts), *results))


def summarize(base: Measured, tuned: Measured, metrics: Mapping[str, Described]) -> dict[str, object]:
    """Means of both models by metric; of those that compare images also the base model's spread and the win rate."""
    compared = [name for name, metric in metrics.items() if metric.compares]

    def means(measured: Measured) -> dict[str, float]:
        return {name: float(np.mean(scores)) for name, scores in measured.scores.items()}

    return {
        "base": means(base),
        "tuned": means(tuned),
        "base_std": {name: float(np.std(base.scores[name])) for name in compared},
        "win_rate": {name: float(np.mean(tuned.scores[name] > base.scores[name])) for name in compared},
        "num_prompts": len(base.images),
    }


def write_scores(path: Path, prompts: Sequence[str], models: Mapping[str, Measured]) -> None:
    """Writes a CSV file with a row for each prompt and model: ``prompt, model``, and a column for each metric."""
    names = list(next(iter(models.values())).scores)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["prompt", "model", *names])
    for i, prompt in enumerate(prompts):
        for model, measured in models.items():
            writer.writerow([prompt, model, *(float(measured.scores[name][i]) for name in names)])
    write_text(path, text.getvalue())
