"""The update: a minibatch of preference pairs, one gradient, one step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree
from ml_collections import ConfigDict

from spo_jax.diffusion.guidance import GuidedPrediction, interleave
from spo_jax.diffusion.process import Process
from spo_jax.preference.losses import LossOptions, Objective, PairLoss, PairOutputs
from spo_jax.runs.metrics import REWARDS
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.types import PreferencePairs, PromptBatch

CLIPPED_FRACTION = 0.95
CLIPPED_BATCHES = 5


@flax.struct.dataclass
class UpdateMetrics:
    """Sums over the pairs of a minibatch, the number of pairs, and the gradient's norm before clipping."""

    sums: PairLoss
    num_pairs: jax.Array
    grad_norm: jax.Array


# ``(trained, its average, UNet's parameters, prompts, pairs, mask) -> (masked mean, masked sums)``.
MinibatchLoss = Callable[
    [PyTree, PyTree | None, PyTree, PromptBatch, PreferencePairs, jax.Array], tuple[jax.Array, PairLoss]
]


# ``(state, UNet's parameters, prompts, pairs, mask) -> (state, metrics)``.
Update = Callable[[TrainState, PyTree, PromptBatch, PreferencePairs, jax.Array], tuple[TrainState, UpdateMetrics]]


def pair_losses(
    objective: Objective, process: Process, outputs: PairOutputs, pairs: PreferencePairs, options: LossOptions
) -> PairLoss:
    """Loss and ratios of each pair, fields [P].

    Args:
      objective: of one pair.
      process: of the sampling.
      outputs: guided outputs [P, h, w, c], or [P, 2, h, w, c] if the pairs have ``lose_latents``.
      pairs: P of them.
      options: of the objective.

    Raises:
      AssertionError: the outputs are not of these pairs.
    """
    count, *latent_shape = pairs.latents.shape
    starts = () if pairs.lose_latents is None else (2,)
    chex.assert_shape(jax.tree.leaves(outputs), (count, *starts, *latent_shape))
    chex.assert_equal_shape([pairs.latents, pairs.win, pairs.lose])
    return jax.vmap(lambda some, pair: objective.loss(process, some, pair, options))(outputs, pairs)


def make_loss(predict: GuidedPrediction, process: Process, objective: Objective, options: LossOptions) -> MinibatchLoss:
    """The loss of P pairs for use with ``jax.grad``; prompts have a row for each.

    The reference is the same network without the ``trained`` variables (see ``TrainState``). The network runs once a
    pair and model, or on both latents where win and lose may start from different ones.
    """

    def loss_fn(
        trained: PyTree,
        average: PyTree | None,
        params: PyTree,
        prompts: PromptBatch,
        pairs: PreferencePairs,
        mask: Bool[Array, " p"],
    ) -> tuple[Float[Array, ""], PairLoss]:
        latents, timesteps = pairs.latents, pairs.timesteps
        if pairs.lose_latents is not None:
            latents, timesteps = interleave(latents, pairs.lose_latents), jnp.repeat(timesteps, 2)
            prompts = prompts.map_rows(lambda rows: jnp.repeat(rows, 2, axis=0))

        def outputs_of(variables: PyTree) -> jax.Array:
            output = predict(variables, latents, timesteps, prompts)
            return output if pairs.lose_latents is None else output.reshape(-1, 2, *output.shape[1:])

        outputs = PairOutputs(
            policy=outputs_of({"params": params, **trained}),
            reference=jax.lax.stop_gradient(outputs_of({"params": params})),
            average=outputs_of({"params": params, **average}) if objective.reads_average and average else None,
        )
        losses = pair_losses(objective, process, outputs, pairs, options)
        chex.assert_equal_shape([mask, losses.loss])
        sums = jax.tree.map(lambda values: jnp.where(mask, values, 0.0).sum(), losses)
        return sums.loss / jnp.maximum(mask.sum(), 1), sums

    return loss_fn


def make_update(loss_fn: MinibatchLoss, optimizer: Optimizer) -> Update:
    """The update on a minibatch of pairs, as ``exchange`` gives it; the last one of a batch may be smaller."""

    def update(
        state: TrainState, params: PyTree, prompts: PromptBatch, pairs: PreferencePairs, mask: jax.Array
    ) -> tuple[TrainState, UpdateMetrics]:
        gradient = jax.grad(loss_fn, has_aux=True)
        grads, sums = gradient(state.trained, state.average, params, prompts, pairs, mask)
        metrics = UpdateMetrics(sums, mask.sum(dtype=jnp.int32), optax.tree.norm(grads))
        return state.apply_gradients(grads, optimizer), metrics

    return update


def update_metrics(updates: list[UpdateMetrics]) -> dict[str, float]:
    """What is logged of the updates of a batch: means over its pairs, and over its updates for the gradient norm.

    A batch without a valid pair is skipped; it logs zeros and log 2, the loss of a pair that teaches nothing.
    """
    if not updates:
        names = ("win_ratio", "lose_ratio", "win_clipped", "lose_clipped", *REWARDS, "grad_norm")
        return {"loss": math.log(2.0), **dict.fromkeys(names, 0.0), "num_updates": 0}
    count = sum(int(m.num_pairs) for m in updates)
    sums = jax.tree.map(lambda *values: float(np.sum(values)), *(m.sums for m in updates))
    means = {name: value / count for name, value in vars(sums).items()}
    win, lose, agreed = (means.pop(name) for name in ("win_reward", "lose_reward", "agreed"))
    return {
        **means,
        **dict(zip(REWARDS, (win, lose, win - lose, agreed), strict=True)),
        "grad_norm": float(np.mean([m.grad_norm for m in updates])),
        "num_updates": len(updates),
    }


def clipped_warning(rows: Sequence[Mapping[str, float]]) -> str | None:
    """What to tell a user whose last batches were clipped on more than 95 % of their pairs; None if all is well.

    A clipped ratio has no gradient: where both are, a pair teaches nothing any more.
    """
    recent = rows[-CLIPPED_BATCHES:]
    clipped = [min(row["win_clipped"], row["lose_clipped"]) for row in recent if row["num_updates"]]
    if len(clipped) < CLIPPED_BATCHES or min(clipped) <= CLIPPED_FRACTION:
        return None
    return (
        f"warning: in each of the last {CLIPPED_BATCHES} batches more than {CLIPPED_FRACTION:.0%} of the probability "
        "ratios were clipped, so the run hardly learns any more; stop here, or start again with a lower "
        "config.train.learning_rate or a wider config.loss.clip_range."
    )


def nothing_learned(config: ConfigDict, num_updates: int) -> str | None:
    """What to tell a user whose run had no pair, or too few for a step; None if it had enough.

    ``num_updates`` are minibatches of pairs since its start.
    """
    train = config.train
    if num_updates == 0:
        return (
            "warning: nothing was learned: no two candidates of a step differed by config.pairs.threshold = "
            f"{config.pairs.threshold}, so there was no pair; lower it, or train on more prompts."
        )
    if num_updates < train.accumulation_steps:
        return (
            f"warning: nothing was learned: there were {num_updates} minibatches, fewer than "
            f"config.train.accumulation_steps = {train.accumulation_steps}; lower it, or train on more batches."
        )
    return None
