"""Pairwise accuracy of judges at chosen timesteps, on pairs as the base model sees them there; and how it is shown."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spo_jax.checkpoints.pipeline import Pipeline, tokenize
from spo_jax.distributed.mesh import batch_sharding, replicated
from spo_jax.errors import UserError
from spo_jax.preference.accuracy import Accuracy, Difference, count_accuracy, count_difference
from spo_jax.preference.scorers import Scorer
from spo_jax.training.evaluation import encode_prompts
from spo_jax.training.noisy_pairs import pair_keys, score_pairs
from spo_jax.training.rollout import make_encode
from spo_jax.types import PromptBatch

TIMESTEPS = (0, 251, 501, 701, 951)  # the paper's


class Judge(NamedTuple):
    """A scorer with the tokenizer of its captions; without ``step_aware`` it is told t = 0 at every timestep."""

    scorer: Scorer
    tokenizer: Any
    step_aware: bool = True


@flax.struct.dataclass
class PairAccuracy:
    """Of one timestep: ``accuracy`` by judge, and ``gain`` of the first judge over each other, on the same pairs."""

    accuracy: dict[str, Accuracy]
    gain: dict[str, Difference]


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
    first, *others = judges
    encode_captions = jax.jit(make_encode(pipeline, scorer=None))

    @jax.jit
    def encode_texts(params: Any, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: judge.scorer.encode_text(params[name], tokens[name]) for name, judge in judges.items()}

    def measure_pairs(params, images, labels, weights, prompts: PromptBatch, texts, timestep, positions, key):
        timesteps = jnp.full((len(images),), timestep)
        clean = predict_clean(params, images, prompts, timesteps, pair_keys(key, positions))
        scores = {
            name: score_pairs(
                judge.scorer,
                params["judges"][name],
                clean,
                texts[name],
                timesteps if judge.step_aware else timesteps * 0,
            )
            for name, judge in judges.items()
        }
        mask = weights > 0
        return PairAccuracy(
            {name: count_accuracy(scores[name], labels, mask) for name in judges},
            {name: count_difference(scores[first], scores[name], labels, mask) for name in others},
        )

    program = jax.jit(measure_pairs, out_shardings=replicated(mesh))

    def place(rows: Any) -> Any:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), rows)

    def measure(params: Any, batches: Iterable[Any], timesteps: Sequence[int], key: jax.Array):
        totals: dict[int, PairAccuracy] = {}
        for batch in batches:
            prompts = encode_prompts(
                lambda params, tokens, negative, _: encode_captions(params, place(tokens), negative, None),
                params,
                pipeline,
                None,
                batch.captions,
            )
            tokens = {name: tokenize(judge.tokenizer, batch.captions) for name, judge in judges.items()}
            texts = encode_texts(params["judges"], place(tokens))
            images, labels, weights, positions = place((batch.images, batch.labels, batch.weights, batch.positions))
            for timestep in timesteps:
                sums = program(
                    params, images, labels, weights, prompts, texts, jnp.int32(timestep), positions, key
                )  # fmt: skip
                sums = jax.tree.map(float, jax.device_get(sums))
                totals[timestep] = jax.tree.map(operator.add, totals[timestep], sums) if timestep in totals else sums
        for timestep, total in totals.items():
            for name, accuracy in total.accuracy.items():
                if not math.isfinite(float(accuracy.agreed)):
                    raise UserError(
                        f"A score of the judge {name!r} is not finite at t = {timestep}; check its weights."
                    )
        return totals

    return measure
