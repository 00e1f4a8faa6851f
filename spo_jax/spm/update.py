"""The update of a step-aware preference model: a batch of judged pairs, one gradient, one optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from spo_jax import rng
from spo_jax.preference.losses import preference_loss
from spo_jax.preference.pairs import labels_from_scores
from spo_jax.preference.scorers import Scorer
from spo_jax.sampling.noisy_pairs import pair_keys, score_pairs
from spo_jax.types import JudgedPairs, PromptBatch, TrainState


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


def make_relabel(judge: Scorer, threshold: float) -> Callable[[Any, JudgedPairs], jax.Array]:
    """``relabel(judge_params, pairs) -> float32 [B, 2]``: labels by a judge of the pictures as they are."""

    def relabel(params: Any, pairs: JudgedPairs) -> jax.Array:
        images = pairs.images.astype(jnp.float32) / 127.5 - 1.0
        assert pairs.judge_tokens is not None
        text = judge.encode_text(params, pairs.judge_tokens)
        scores = score_pairs(judge, params, images, text, jnp.zeros(len(images), jnp.int32))
        return jax.vmap(lambda pair: labels_from_scores(pair, threshold))(scores)

    return relabel


def make_spm_loss(
    scorer: Scorer,
) -> Callable[[Any, Float[Array, "b 2 H W 3"], JudgedPairs, jax.Array], tuple[jax.Array, jax.Array]]:
    """``loss(params, clean, pairs, timesteps [B]) -> (mean, scores [B, 2])`` for use with ``jax.grad``.

    ``clean`` are the pictures as ``make_predict_clean`` gives them. The mean is weighted by ``pairs.weights``,
    normalised over the global batch: so a prompt with many pairs counts as one with few, as in the released code. A
    batch without any weight has loss and gradient 0.
    """

    def loss_fn(params: Any, clean: jax.Array, pairs: JudgedPairs, timesteps: jax.Array):
        text = scorer.encode_text(params, pairs.scorer_tokens)
        scores = score_pairs(scorer, params, clean, text, timesteps)
        losses = jax.vmap(preference_loss)(scores, pairs.labels)
        return (pairs.weights * losses).sum() / jnp.maximum(pairs.weights.sum(), 1e-12), scores

    return loss_fn


def make_spm_update(
    encode: Callable[[Any, tuple[jax.Array, ...]], PromptBatch],
    predict_clean: Callable[..., jax.Array],
    scorer: Scorer,
    optimizer: optax.GradientTransformation,
    *,
    timesteps: tuple[int, int] = (0, 1000),
    relabel: Callable[[Any, JudgedPairs], jax.Array] | None = None,
    ema_decay: float = 0.0,
) -> Callable[..., tuple[TrainState, SPMMetrics]]:
    """``update(state, frozen, pairs, key) -> (state, metrics)``, compiled once (SPO, section 3.2).

    Args:
      encode: ``(frozen, tokens) -> PromptBatch``, the base model's text encoders.
      predict_clean: from ``make_predict_clean``.
      scorer: the preference model.
      optimizer: acts on its parameters.
      timesteps: each pair gets one of them, from the first up to the second, not included.
      relabel: gives the pairs new labels, with the parameters ``frozen["judge"]``.
      ema_decay: of the average, where the state has one.

    Returns:
      A function of the state, the frozen parameters, a global batch, and the root key of the run: timestep and noise of
      a pair are named by its place in the stream of records.
    """
    loss_fn = make_spm_loss(scorer)

    def update(state: TrainState, frozen: Any, pairs: JudgedPairs, key: jax.Array) -> tuple[TrainState, SPMMetrics]:
        keys = pair_keys(key, pairs.positions)
        times = jax.vmap(lambda k: jax.random.randint(rng.stream(k, "timestep"), (), *timesteps))(keys)
        clean = predict_clean(frozen, pairs.images, encode(frozen, pairs.tokens), times, keys)
        if relabel is not None:
            pairs = dataclasses.replace(pairs, labels=relabel(frozen["judge"], pairs))
        (loss, scores), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trained, clean, pairs, times)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        average = state.average
        if average is not None:
            average = optax.incremental_update(trained, average, 1.0 - ema_decay)
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
        return TrainState(state.step + 1, trained, opt_state, average), metrics

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


def metrics_to_json(updates: list[SPMMetrics]) -> list[dict[str, float]]:
    """Of some updates, as a checkpoint keeps them that is written before they are logged; every bit is kept."""
    return [{name: value.item() for name, value in vars(m).items()} for m in jax.device_get(updates)]


def metrics_from_json(rows: list[dict[str, float]]) -> list[SPMMetrics]:
    """What ``metrics_to_json`` was given, on the host."""

    def exact(value: float) -> Any:
        return np.int32(value) if isinstance(value, int) else np.float32(value)

    return [SPMMetrics(**{name: exact(value) for name, value in row.items()}) for row in rows]
