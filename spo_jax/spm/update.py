"""The update of a step-aware preference model: a minibatch of labelled pairs, one gradient, one optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from spo_jax import rng
from spo_jax.preference.losses import preference_loss
from spo_jax.preference.pairs import labels_from_scores
from spo_jax.preference.scorers import ImageScorer, score_pairs
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import EncodeCaptions
from spo_jax.sampling.noisy_pairs import PredictClean, pair_keys
from spo_jax.types import LabelledPairs

Relabel = Callable[[PyTree, LabelledPairs], jax.Array]  # (labeller's parameters, pairs) -> labels float32 [B, 2]


@flax.struct.dataclass
class SPMMetrics:
    """Sums over a batch, and the gradient's norm before clipping.

    ``loss`` is weighted, ``weight`` the sum of the weights; ``agreements`` counts the pairs whose scores prefer the
    picture that the label prefers, of ``num_preferences`` whose label is no tie.
    """

    loss: jax.Array
    weight: jax.Array
    agreements: jax.Array
    num_preferences: jax.Array
    num_pairs: jax.Array
    grad_norm: jax.Array


# ``(state, frozen parameters, pairs, root key of the run's pairs) -> (state, metrics)``.
SPMUpdate = Callable[[TrainState, dict[str, PyTree], LabelledPairs, jax.Array], tuple[TrainState, SPMMetrics]]


class SeenPairs(NamedTuple):
    """How pairs are seen: the base model's text encoders and prediction, and the timesteps drawn, the last excluded."""

    encode: EncodeCaptions
    predict_clean: PredictClean
    timesteps: tuple[int, int] = (0, 1000)


def make_relabel(labeller: ImageScorer, threshold: float) -> Relabel:
    """Labels by a scorer of the images as they are."""

    def relabel(params: PyTree, pairs: LabelledPairs) -> jax.Array:
        images = pairs.images.astype(jnp.float32) / 127.5 - 1.0
        assert pairs.labeller_tokens is not None
        text = labeller.encode_text(params, pairs.labeller_tokens)
        scores = score_pairs(labeller, params, images, text, jnp.zeros(len(images), jnp.int32))
        return jax.vmap(lambda pair: labels_from_scores(pair, threshold))(scores)

    return relabel


def spm_loss(
    scorer: ImageScorer,
    params: PyTree,
    clean: Float[Array, "b 2 H W 3"],
    pairs: LabelledPairs,
    timesteps: Int[Array, " b"],
) -> tuple[Float[Array, ""], Float[Array, "b 2"]]:
    """Mean loss and scores.

    ``clean`` are the images as ``PredictClean`` gives them. The mean is weighted by ``pairs.weights``, normalised over
    the global batch: so a prompt with many pairs counts as one with few, as in the released code. A batch without any
    weight has loss and gradient 0.
    """
    assert pairs.scorer_tokens is not None
    text = scorer.encode_text(params, pairs.scorer_tokens)
    scores = score_pairs(scorer, params, clean, text, timesteps)
    losses = jax.vmap(preference_loss)(scores, pairs.labels)
    return (pairs.weights * losses).sum() / jnp.maximum(pairs.weights.sum(), 1e-12), scores


def make_spm_update(
    scorer: ImageScorer, seen: SeenPairs, optimizer: Optimizer, relabel: Relabel | None = None
) -> SPMUpdate:
    """The update (SPO, section 3.2).

    Args:
      scorer: the preference model.
      seen: how pairs are seen; each gets one of the timesteps.
      optimizer: acts on the preference model's parameters.
      relabel: gives the pairs new labels, with the parameters ``frozen["labeller"]``.

    Returns:
      A function of the state, the base model's parameters and maybe the labeller's, a global batch, and a key: timestep
      and noise of a pair are named by its place in the stream of records.
    """

    def update(
        state: TrainState, frozen: dict[str, PyTree], pairs: LabelledPairs, key: jax.Array
    ) -> tuple[TrainState, SPMMetrics]:
        keys = pair_keys(key, pairs.positions)
        times = jax.vmap(lambda k: jax.random.randint(rng.stream(k, "timestep"), (), *seen.timesteps))(keys)
        clean = seen.predict_clean(frozen, pairs.images, seen.encode(frozen, pairs.tokens), times, keys)
        if relabel is not None:
            pairs = dataclasses.replace(pairs, labels=relabel(frozen["labeller"], pairs))

        def loss_fn(trained: PyTree) -> tuple[jax.Array, jax.Array]:
            return spm_loss(scorer, trained, clean, pairs, times)

        (loss, scores), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        margin, wanted = scores[:, 0] - scores[:, 1], pairs.labels[:, 0] - pairs.labels[:, 1]
        weight = pairs.weights.sum()
        metrics = SPMMetrics(
            loss=loss * weight,
            weight=weight,
            agreements=((margin * wanted > 0) & (pairs.weights > 0)).sum(dtype=jnp.int32),
            num_preferences=((wanted != 0) & (pairs.weights > 0)).sum(dtype=jnp.int32),
            num_pairs=(pairs.weights > 0).sum(dtype=jnp.int32),
            grad_norm=optax.tree.norm(grads),
        )
        return state.apply_gradients(grads, optimizer), metrics

    return update


def spm_metrics(updates: list[SPMMetrics]) -> dict[str, float]:
    """What is logged of some updates: means over their pairs (0 if there is none), and over updates of the norm."""
    updates = jax.device_get(updates)
    loss, weight, agreements, preferences, pairs = (
        float(np.sum([getattr(m, name) for m in updates]))
        for name in ("loss", "weight", "agreements", "num_preferences", "num_pairs")
    )
    return {
        "loss": loss / (weight or 1.0),
        "accuracy": agreements / max(preferences, 1.0),
        "num_pairs": pairs,
        "grad_norm": float(np.mean([m.grad_norm for m in updates])),
    }
