"""Pairwise accuracy of judges at chosen timesteps, on pairs as the base model sees them there; and how it is shown."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from spo_jax.data.preferences import PairBatch
from spo_jax.distributed.mesh import batch_sharding, jit_on, replicated
from spo_jax.errors import UserError
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.preference.accuracy import Accuracy, Difference, count_accuracy, count_difference
from spo_jax.preference.scorers import Scorer
from spo_jax.sampling.encode import make_encode_captions
from spo_jax.sampling.noisy_pairs import pair_keys, score_pairs
from spo_jax.types import PromptBatch

# Names of the judges that are measured: the one in question, the same one kept from knowing t, another one without t.
SCORER, TOLD_0, PLAIN = "scorer", "told_0", "plain"


class Judge(NamedTuple):
    """A scorer with the tokenizer of its captions; without ``step_aware`` it is told t = 0 at every timestep."""

    scorer: Scorer
    tokenizer: Any
    step_aware: bool = True


@flax.struct.dataclass
class PairAccuracy:
    """Of one timestep: ``accuracy`` by judge, and ``gain`` of the first judge over each other one on the same pairs."""

    accuracy: dict[str, Accuracy]
    gain: dict[str, Difference]


def make_measure_pairs(
    predict_clean: Callable[..., jax.Array], judges: Mapping[str, Judge]
) -> Callable[..., PairAccuracy]:
    """``measure_pairs(params, images, labels, weights, prompts, texts, timestep, positions, key) -> PairAccuracy``.

    The program behind ``make_measure_accuracy``, of one batch and one timestep; counts instead of means.
    """
    first, *others = judges

    def measure_pairs(params, images, labels, weights, prompts: PromptBatch, texts, timestep, positions, key):
        timesteps = jnp.full((len(images),), timestep)
        clean = predict_clean(params, images, prompts, timesteps, pair_keys(key, positions))
        scores = {}
        for name, judge in judges.items():
            told = timesteps if judge.step_aware else jnp.zeros_like(timesteps)
            scores[name] = score_pairs(judge.scorer, params["judges"][name], clean, texts[name], told)
        mask = weights > 0
        return PairAccuracy(
            {name: count_accuracy(scores[name], labels, mask) for name in judges},
            {name: count_difference(scores[first], scores[name], labels, mask) for name in others},
        )

    return measure_pairs


def make_measure_accuracy(
    pipeline: Pipeline, predict_clean: Callable[..., jax.Array], judges: Mapping[str, Judge], mesh: Mesh
) -> Callable[..., dict[int, PairAccuracy]]:
    """``measure(params, batches, timesteps, key) -> {timestep: PairAccuracy}``, compiled once for all timesteps.

    All judges see the same pictures, with the same noise: the key and a pair's position decide it, whatever the batch.

    Args:
      pipeline: the base model.
      predict_clean: see ``make_predict_clean``.
      judges: by name. The first is the one whose gain over the others is measured.
      mesh: the devices that a batch is split over.

    Returns:
      A function of ``params`` (the pipeline's, and the judges' by name under ``"judges"``), batches of pairs
      (``PairBatch``; rows of weight 0 do not count), timesteps, and a key. It raises UserError where a score is not
      finite.
    """
    encode_captions = jit_on(mesh, make_encode_captions(pipeline))

    def encode(params: Any, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: judge.scorer.encode_text(params[name], tokens[name]) for name, judge in judges.items()}

    encode_texts = jit_on(mesh, encode)
    program = jit_on(mesh, make_measure_pairs(predict_clean, judges), out_shardings=replicated(mesh))

    def place(rows: Any) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), rows)

    def measure(params: Any, batches: Iterable[PairBatch], timesteps: Sequence[int], key: jax.Array):
        totals: dict[int, PairAccuracy] = {}
        for batch in batches:
            prompts = encode_captions(params, place(tokenize_prompts(pipeline, batch.captions)))
            tokens = {name: tokenize(judge.tokenizer, batch.captions) for name, judge in judges.items()}
            texts = encode_texts(params["judges"], place(tokens))
            # As uint32, because JAX has no wider integers; -1, of rows that fill up, becomes some other key.
            rows = (batch.images, batch.labels, batch.weights, batch.positions.astype(np.uint32))
            images, labels, weights, positions = place(rows)
            for timestep in timesteps:
                at = jnp.int32(timestep)
                sums = program(params, images, labels, weights, prompts, texts, at, positions, key)
                sums = jax.tree.map(float, jax.device_get(sums))
                totals[timestep] = jax.tree.map(operator.add, totals[timestep], sums) if timestep in totals else sums
        for timestep, total in totals.items():
            for name, accuracy in total.accuracy.items():
                if not math.isfinite(accuracy.agreed):
                    what = f"Scores of the judge {name!r} are not finite at t = {timestep}"
                    raise UserError(f"{what}; check its weights.")
        return totals

    return measure


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


def accuracy_row(measured: PairAccuracy) -> dict[str, Any]:
    """One timestep for a JSON file: each judge's accuracy, and the gain of the first over each other one."""

    def of(sums: Accuracy | Difference) -> dict[str, Any]:
        return {"value": sums.value if math.isfinite(sums.value) else None, "interval": sums.interval}

    return {
        "accuracy": {name: of(accuracy) for name, accuracy in measured.accuracy.items()},
        "gain": {name: of(difference) for name, difference in measured.gain.items()},
    }


def accuracy_table(measured: Mapping[int, PairAccuracy], judges: Sequence[str]) -> str:
    """A Markdown table: a column for each timestep, a row for each judge and for each gain, with 95 % intervals."""
    rows = [("pairwise accuracy", [f"t = {timestep}" for timestep in measured])]
    rows += [(name, [_cell(m.accuracy[name], "") for m in measured.values()]) for name in judges]
    rows += [(f"gain over {name}", [_cell(m.gain[name], "+") for m in measured.values()]) for name in judges[1:]]
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
