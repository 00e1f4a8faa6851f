"""The update: a minibatch of preference pairs, one gradient, one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from spo_jax.diffusion.guidance import GuidedPrediction, interleave
from spo_jax.diffusion.process import ddim_distribution, log_prob, predict_x0_and_noise
from spo_jax.diffusion.schedule import Schedule
from spo_jax.preference.losses import PairLoss, spo_loss
from spo_jax.types import PreferencePairs, PromptBatch, TrainState


@flax.struct.dataclass
class UpdateMetrics:
    """Sums over the pairs of a minibatch, the number of pairs, and the gradient's norm before clipping."""

    sums: PairLoss
    num_pairs: jax.Array
    grad_norm: jax.Array


def transition_log_probs(
    schedule: Schedule, model_output: jax.Array, pair: PreferencePairs, eta: float
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities of win and lose under one model, for one pair.

    Win and lose share the timestep and the prompt. Where they share x_t too, one network output [h, w, c] serves both;
    otherwise ``model_output`` is [2, h, w, c], that of win first.
    """

    def distribution(output: jax.Array, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        x0, eps = predict_x0_and_noise(schedule, output, latents, pair.timesteps)
        return ddim_distribution(schedule, x0, eps, pair.timesteps, pair.previous_timesteps, eta)

    if pair.lose_latents is None:
        win = lose = distribution(model_output, pair.latents)
    else:
        win, lose = distribution(model_output[0], pair.latents), distribution(model_output[1], pair.lose_latents)
    return log_prob(pair.win, *win), log_prob(pair.lose, *lose)


def pair_losses(
    schedule: Schedule,
    policy_output: jax.Array,
    reference_output: jax.Array,
    pairs: PreferencePairs,
    *,
    eta: float,
    beta: float,
    clip_range: float,
) -> PairLoss:
    """Loss and ratios of each pair, fields [P], from the guided outputs of policy and reference.

    Outputs are [P, h, w, c], or [P, 2, h, w, c] if the pairs have ``lose_latents``.

    Raises:
      AssertionError: the outputs are not of these pairs.
    """
    count, *latent_shape = pairs.latents.shape
    starts = () if pairs.lose_latents is None else (2,)
    chex.assert_shape([policy_output, reference_output], (count, *starts, *latent_shape))
    chex.assert_equal_shape([pairs.latents, pairs.win, pairs.lose])

    def one(policy: jax.Array, reference: jax.Array, pair: PreferencePairs) -> PairLoss:
        win, lose = transition_log_probs(schedule, policy, pair, eta)
        win_reference, lose_reference = transition_log_probs(schedule, reference, pair, eta)
        return spo_loss(win - win_reference, lose - lose_reference, beta=beta, clip_range=clip_range)

    return jax.vmap(one)(policy_output, reference_output, pairs)


def make_loss(
    predict: GuidedPrediction, schedule: Schedule, *, eta: float, beta: float, clip_range: float
) -> Callable[..., tuple[jax.Array, PairLoss]]:
    """``loss(trained, params, prompts, pairs, mask) -> (masked mean, masked sums)`` for use with ``jax.grad``.

    ``prompts`` has a row for each of the P pairs.

    The reference is the same network without the ``trained`` variables (see ``TrainState``). The network runs once a
    pair, or on both latents where win and lose may start from different ones.
    """

    def loss_fn(trained: Any, params: Any, prompts: PromptBatch, pairs: PreferencePairs, mask: jax.Array):
        latents, timesteps = pairs.latents, pairs.timesteps
        if pairs.lose_latents is not None:
            latents, timesteps = interleave(latents, pairs.lose_latents), jnp.repeat(timesteps, 2)
            prompts = prompts.map_rows(lambda rows: jnp.repeat(rows, 2, axis=0))

        def outputs(variables: Any) -> jax.Array:
            output = predict(variables, latents, timesteps, *prompts.conditions)
            return output if pairs.lose_latents is None else output.reshape(-1, 2, *output.shape[1:])

        policy = outputs({"params": params, **trained})
        reference = jax.lax.stop_gradient(outputs({"params": params}))
        losses = pair_losses(schedule, policy, reference, pairs, eta=eta, beta=beta, clip_range=clip_range)
        chex.assert_equal_shape([mask, losses.loss])
        sums = jax.tree.map(lambda values: jnp.where(mask, values, 0.0).sum(), losses)
        return sums.loss / jnp.maximum(mask.sum(), 1), sums

    return loss_fn


def make_update(
    loss_fn: Callable[..., tuple[jax.Array, PairLoss]],
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
) -> Callable[..., tuple[TrainState, UpdateMetrics]]:
    """The update on a minibatch of pairs, as ``exchange`` gives it; the last one of a batch may be smaller.

    Args:
      loss_fn: from ``make_loss``.
      optimizer: acts on the trained variables.
      ema_decay: of the average, where the state has one.

    Returns:
      ``update(state, params, prompts, pairs, mask) -> (state, metrics)``, compiled once.
    """

    def update(
        state: TrainState, params: Any, prompts: PromptBatch, pairs: PreferencePairs, mask: jax.Array
    ) -> tuple[TrainState, UpdateMetrics]:
        grads, sums = jax.grad(loss_fn, has_aux=True)(state.trained, params, prompts, pairs, mask)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        chex.assert_trees_all_equal_shapes_and_dtypes(trained, state.trained)  # else it is compiled again at each step
        average = state.average
        if average is not None:
            average = optax.incremental_update(trained, average, 1.0 - ema_decay)
        metrics = UpdateMetrics(sums, mask.sum(dtype=jnp.int32), optax.tree.norm(grads))
        return TrainState(state.step + 1, trained, opt_state, average), metrics

    return update


def update_metrics(updates: list[UpdateMetrics]) -> dict[str, float]:
    """What is logged of the updates of a batch: means over its pairs, and over its updates for the gradient norm.

    A batch without a valid pair is skipped; it logs zeros and log 2, the loss of a pair that teaches nothing.
    """
    if not updates:
        names = ("win_ratio", "lose_ratio", "win_clipped", "lose_clipped", "grad_norm")
        return {"loss": math.log(2.0), **dict.fromkeys(names, 0.0), "num_updates": 0}
    count = sum(int(m.num_pairs) for m in updates)
    sums = jax.tree.map(lambda *values: float(np.sum(values)), *(m.sums for m in updates))
    return {
        "loss": sums.loss / count,
        "win_ratio": sums.win_ratio / count,
        "lose_ratio": sums.lose_ratio / count,
        "win_clipped": sums.win_clipped / count,
        "lose_clipped": sums.lose_clipped / count,
        "grad_norm": float(np.mean([m.grad_norm for m in updates])),
        "num_updates": len(updates),
    }
