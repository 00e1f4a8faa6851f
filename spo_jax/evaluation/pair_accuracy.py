"""Pairwise accuracy of scorers at chosen timesteps, on pairs as the base model sees them there; and how it is shown."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree, UInt, UInt8

from spo_jax.data.preferences import PairBatch
from spo_jax.distributed.mesh import batch_sharding, jit_on, replicated
from spo_jax.errors import UserError
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.preference.accuracy import Accuracy, Difference, count_accuracy, count_difference
from spo_jax.preference.scorers import ImageScorer, score_pairs
from spo_jax.sampling.encode import make_encode_captions
from spo_jax.sampling.noisy_pairs import PredictClean, pair_keys
from spo_jax.types import PromptBatch, Tokenizer

# Names of the scorers that are measured: the one in question, the same one kept from knowing t, another one without t.
SCORER, TOLD_0, PLAIN = "scorer", "told_0", "plain"


class AskedScorer(NamedTuple):
    """A scorer with the tokenizer of its captions; without ``step_aware`` it is told t = 0 at every timestep."""

    scorer: ImageScorer
    tokenizer: Tokenizer
    step_aware: bool = True


@flax.struct.dataclass
class PairAccuracy:
    """Of one timestep: ``accuracy`` by scorer, and ``gain`` of the first one over each other one on the same pairs."""

    accuracy: dict[str, Accuracy]
    gain: dict[str, Difference]


class AccuracyPrograms(NamedTuple):
    """What a measurement computes, compiled once for all timesteps.

    Attributes:
      encode_captions: an ``EncodeCaptions``.
      encode_texts: ``(scorers' parameters, tokens) -> texts``, all of them by scorer.
      measure_pairs: ``(params, images, labels, weights, prompts, texts, timestep, positions, key) -> PairAccuracy``.
    """

    encode_captions: jax.stages.Wrapped
    encode_texts: jax.stages.Wrapped
    measure_pairs: jax.stages.Wrapped


def make_accuracy_programs(
    pipeline: Pipeline, predict_clean: PredictClean, scorers: Mapping[str, AskedScorer], mesh: Mesh
) -> AccuracyPrograms:
    """The programs. All scorers see the same images, with the same noise.

    Args:
      pipeline: the base model.
      predict_clean: see ``make_predict_clean``.
      scorers: by name. The first is the one whose gain over the others is measured.
      mesh: the devices that a batch is split over.
    """
    first, *others = scorers

    def encode_texts(params: PyTree, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: asked.scorer.encode_text(params[name], tokens[name]) for name, asked in scorers.items()}

    def measure_pairs(
        params: dict[str, PyTree],
        images: UInt8[Array, "b 2 H W 3"],
        labels: Float[Array, "b 2"],
        weights: Float[Array, " b"],
        prompts: PromptBatch,
        texts: dict[str, jax.Array],
        timestep: Int[Array, ""],
        positions: UInt[Array, " b"],
        key: jax.Array,
    ) -> PairAccuracy:
        timesteps = jnp.full((len(images),), timestep)
        clean = predict_clean(params, images, prompts, timesteps, pair_keys(key, positions))
        scores = {}
        for name, asked in scorers.items():
            told = timesteps if asked.step_aware else jnp.zeros_like(timesteps)
            scores[name] = score_pairs(asked.scorer, params["scorers"][name], clean, texts[name], told)
        mask = weights > 0
        return PairAccuracy(
            {name: count_accuracy(scores[name], labels, mask) for name in scorers},
            {name: count_difference(scores[first], scores[name], labels, mask) for name in others},
        )

    return AccuracyPrograms(
        jit_on(mesh, make_encode_captions(pipeline)),
        jit_on(mesh, encode_texts),
        jit_on(mesh, measure_pairs, out_shardings=replicated(mesh)),
    )


class AccuracyMeasure(NamedTuple):
    """A measurement of scorers: its programs, and what brings captions and images to them."""

    programs: AccuracyPrograms
    pipeline: Pipeline
    scorers: Mapping[str, AskedScorer]
    mesh: Mesh


def measure_accuracy(
    made: AccuracyMeasure,
    params: dict[str, PyTree],
    batches: Iterable[PairBatch],
    timesteps: Sequence[int],
    key: jax.Array,
) -> dict[int, PairAccuracy]:
    """Accuracy at each timestep.

    Args:
      made: see there.
      params: the base model's parts, and those of the scorers, by name, under ``"scorers"``.
      batches: of this process; rows of weight 0 do not count.
      timesteps: where to measure.
      key: of the noise.

    Raises:
      UserError: a score is not finite.
    """
    split = batch_sharding(made.mesh)

    def place(rows: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), rows)

    totals: dict[int, PairAccuracy] = {}
    for batch in batches:
        prompts = made.programs.encode_captions(params, place(tokenize_prompts(made.pipeline, batch.captions)))
        tokens = {name: tokenize(asked.tokenizer, batch.captions) for name, asked in made.scorers.items()}
        texts = made.programs.encode_texts(params["scorers"], place(tokens))
        # As uint32, because JAX has no wider integers; -1, of rows that fill up, becomes some other key.
        rows = (batch.images, batch.labels, batch.weights, batch.positions.astype(np.uint32))
        images, labels, weights, positions = place(rows)
        for timestep in timesteps:
            at = jnp.int32(timestep)
            sums = made.programs.measure_pairs(params, images, labels, weights, prompts, texts, at, positions, key)
            sums = jax.tree.map(float, jax.device_get(sums))
            totals[timestep] = jax.tree.map(operator.add, totals[timestep], sums) if timestep in totals else sums
    for timestep, total in totals.items():
        for name, accuracy in total.accuracy.items():
            if not math.isfinite(accuracy.agreed):
                what = f"Scores of the scorer {name!r} are not finite at t = {timestep}"
                raise UserError(f"{what}; check its weights.")
    return totals


def first_pairs(batches: Iterable[PairBatch], count: int) -> Iterator[PairBatch]:
    """The first ``count`` pairs that have a weight, in all processes together: all behind them get weight 0.

    All processes must go through it, each with its share of every batch as ``PairLoader`` gives it.
    """
    for batch in batches:
        # Row r of process i is row r * P + i of the batch of all P processes.
        usable = np.asarray(multihost_utils.process_allgather(batch.weights > 0)).T
        number = np.cumsum(usable).reshape(usable.shape)[:, jax.process_index()]
        yield dataclasses.replace(batch, weights=np.where(number <= count, batch.weights, np.float32(0)))
        count -= int(usable.sum())
        if count <= 0:
            return


def accuracy_row(measured: PairAccuracy) -> dict[str, object]:
    """One timestep for a JSON file: each scorer's accuracy, and the gain of the first over each other one."""

    def of(sums: Accuracy | Difference) -> dict[str, object]:
        return {"value": sums.value if math.isfinite(sums.value) else None, "interval": sums.interval}

    return {
        "accuracy": {name: of(accuracy) for name, accuracy in measured.accuracy.items()},
        "gain": {name: of(difference) for name, difference in measured.gain.items()},
    }


def accuracy_table(measured: Mapping[int, PairAccuracy], scorers: Sequence[str]) -> str:
    """A Markdown table: a column for each timestep, a row for each scorer and for each gain, with 95 % intervals."""
    rows = [("pairwise accuracy", [f"t = {timestep}" for timestep in measured])]
    rows += [(name, [_cell(m.accuracy[name], "") for m in measured.values()]) for name in scorers]
    rows += [(f"gain over {name}", [_cell(m.gain[name], "+") for m in measured.values()]) for name in scorers[1:]]
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(measured))]
    label_width = max(len(label) for label, _ in rows)
    lines = [
        " | ".join(["| " + label.ljust(label_width), *(c.ljust(w) for c, w in zip(cells, widths, strict=True))]) + " |"
        for label, cells in rows
    ]
    rule = "|".join(["|" + "-" * (label_width + 2), *("-" * (width + 2) for width in widths)]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(sums: Accuracy | Difference, sign: str) -> str:
    low, high = sums.interval
    return f"{sums.value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
