"""The update on given pairs: a minibatch of images, one gradient, one step of the optimizer."""

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
from spo_jax.diffusion.guidance import GuidedPrediction
from spo_jax.diffusion.process import Process
from spo_jax.preference.losses import LossOptions, PairErrors, implicit_rewards
from spo_jax.preference.offline import GivenPairs, Offline, guarded
from spo_jax.runs.metrics import REWARDS
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import EncodeCaptions, Tokens
from spo_jax.sampling.noisy_pairs import AddNoise, pair_keys
from spo_jax.types import LabelledPairs, PromptBatch

ERRORS = ("error/chosen", "error/rejected", "error/chosen_reference", "error/rejected_reference")


class PairView(NamedTuple):
    """How pairs are seen.

    Attributes:
      encode: the text encoders, of captions.
      add_noise: autoencoder and noise.
      predict: the UNet, without guidance.
      process: of the noise.
      empty_tokens: of the empty prompt, [1, L] for each text encoder.
      empty_prompts: share of pairs that get it in training.
      true_size: SDXL is told each image's own size and crop.
    """

    encode: EncodeCaptions
    add_noise: AddNoise
    predict: GuidedPrediction
    process: Process
    empty_tokens: Tokens
    empty_prompts: float = 0.0
    true_size: bool = False


@flax.struct.dataclass
class NoisyPairs:
    """B pairs as the UNet gets them, the better image first, that of row i at rows 2i and 2i + 1.

    Attributes:
      latents: float32 [2B, h, w, c], with noise.
      noise: float32 [B, h, w, c], what the network should find in both.
      timesteps: int32 [2B].
      prompts: of 2B rows.
      tied: bool [B]; usable: bool [B].
    """

    latents: jax.Array
    noise: jax.Array
    timesteps: jax.Array
    prompts: PromptBatch
    tied: jax.Array
    usable: jax.Array


@flax.struct.dataclass
class DPOMetrics:
    """Sums over the usable pairs of a minibatch by name, their number, the gradient's norm before clipping, and the
    guard's factor (1 without a guard)."""

    sums: dict[str, jax.Array]
    num_pairs: jax.Array
    grad_norm: jax.Array
    guard: jax.Array


# ``(state, frozen parameters, pairs, root key of the run's pairs) -> (state, metrics)``.
DPOUpdate = Callable[[TrainState, dict[str, PyTree], LabelledPairs, jax.Array], tuple[TrainState, DPOMetrics]]


def see_pairs(
    view: PairView,
    frozen: dict[str, PyTree],
    pairs: LabelledPairs,
    timesteps: Int[Array, " b"],
    keys: jax.Array,
) -> NoisyPairs:
    """Encodes images and captions and adds noise: one timestep and one noise for both images of a pair."""
    first = pairs.labels[:, 0] >= pairs.labels[:, 1]

    def better_first(x: jax.Array) -> jax.Array:
        return jnp.where(first.reshape(-1, *(1,) * (x.ndim - 1)), x, x[:, ::-1])

    prompts = view.encode(frozen, pairs.tokens).map_rows(lambda rows: jnp.repeat(rows, 2, axis=0))
    if view.true_size and prompts.added is not None:
        target = prompts.added.time_ids[:, 4:]
        own = better_first(pairs.crops).reshape(-1, 4).astype(target.dtype)
        added = dataclasses.replace(prompts.added, time_ids=jnp.concatenate([own, target], axis=-1))
        prompts = dataclasses.replace(prompts, added=added)
    latents, noise = view.add_noise(frozen, better_first(pairs.images), timesteps, keys)
    return NoisyPairs(
        latents=latents.reshape(-1, *latents.shape[2:]),
        noise=noise,
        timesteps=jnp.repeat(timesteps, 2),
        prompts=prompts,
        tied=pairs.labels[:, 0] == pairs.labels[:, 1],
        usable=pairs.weights > 0,
    )


def predicted_noise(view: PairView, variables: PyTree, seen: NoisyPairs) -> Float[Array, "b 2 h w c"]:
    """The noise that a network finds in each image; policy and reference both go through this."""
    output = view.predict(variables, seen.latents, seen.timesteps, seen.prompts)
    _, noise = jax.vmap(view.process.to_x0_and_noise)(output, seen.latents, seen.timesteps)
    return noise.reshape(-1, 2, *noise.shape[1:])


def errors_of(policy: jax.Array, reference: jax.Array | None, noise: jax.Array) -> PairErrors:
    """Errors of B pairs, fields float32 [B]: means over latent elements; those without a reference are zeros."""

    def mean(x: jax.Array) -> jax.Array:
        return x.mean(axis=tuple(range(1, x.ndim)))

    residuals = policy - noise[:, None]
    win, lose = residuals[:, 0], residuals[:, 1]
    errors = PairErrors(mean(jnp.square(win)), mean(jnp.square(lose)), *jnp.zeros((2, len(policy))))
    errors = dataclasses.replace(errors, overlap=mean(win * lose))
    if reference is None:
        return errors
    of_reference = jnp.square(reference - noise[:, None])
    return dataclasses.replace(
        errors,
        win_reference=mean(of_reference[:, 0]),
        lose_reference=mean(of_reference[:, 1]),
        shift=mean(jnp.square(policy[:, 0] - reference[:, 0])),
    )


def reference_variables(trained: PyTree, reference: PyTree | None, unet: PyTree) -> PyTree:
    """The reference's variables, in the form of the policy's, so that at the start both compute the same numbers.

    Args:
      trained: of the policy.
      reference: of the state; None for the base model.
      unet: the base model's parameters.
    """
    if reference is not None:
        return {"params": unet, **reference}
    return {"params": unet, **{part: jax.tree.map(jnp.zeros_like, trained[part]) for part in trained if part == "lora"}}


# ``(trained, reference of the state, frozen, pairs, timestep, key) -> (errors, tied [B], usable [B])``.
PairErrorsOf = Callable[
    [PyTree, PyTree | None, dict[str, PyTree], LabelledPairs, jax.Array, jax.Array],
    tuple[PairErrors, jax.Array, jax.Array],
]


def make_pair_errors(view: PairView) -> PairErrorsOf:
    """Errors of policy and reference on a batch of pairs at one timestep, with their own prompts.

    The noise of a pair is named by its place in the stream of records, and by the timestep.
    """

    def errors(
        trained: PyTree,
        reference: PyTree | None,
        frozen: dict[str, PyTree],
        pairs: LabelledPairs,
        timestep: Int[Array, ""],
        key: jax.Array,
    ) -> tuple[PairErrors, jax.Array, jax.Array]:
        keys = pair_keys(jax.random.fold_in(key, timestep), pairs.positions)
        seen = see_pairs(view, frozen, pairs, jnp.full(len(pairs.images), timestep), keys)
        policy = predicted_noise(view, {"params": frozen["unet"], **trained}, seen)
        of_reference = predicted_noise(view, reference_variables(trained, reference, frozen["unet"]), seen)
        return errors_of(policy, of_reference, seen.noise), seen.tied, seen.usable

    return errors


def make_dpo_update(
    view: PairView, objective: Offline, options: LossOptions, optimizer: Optimizer, guard: float | None = None
) -> DPOUpdate:
    """The update (Diffusion-DPO, arXiv 2311.12908; ``preference/offline.py`` has the objectives).

    Args:
      view: how pairs are seen.
      objective: on a batch of pairs.
      options: of it; beta is set.
      optimizer: acts on the trained variables of the UNet.
      guard: strength of the loser guard, see ``offline.guarded``; None: none.

    Returns:
      A function of the state, the frozen parameters, a global minibatch, and a key: timestep, noise and the choice of
      the empty prompt of a pair are named by its place in the stream of records.
    """

    def update(
        state: TrainState, frozen: dict[str, PyTree], pairs: LabelledPairs, key: jax.Array
    ) -> tuple[TrainState, DPOMetrics]:
        keys = pair_keys(key, pairs.positions)
        count = view.process.num_train_timesteps
        times = jax.vmap(lambda k: jax.random.randint(rng.stream(k, "timestep"), (), 0, count))(keys)
        empty = jax.vmap(lambda k: jax.random.uniform(rng.stream(k, "empty prompt")))(keys) < view.empty_prompts
        tokens = tuple(
            jnp.where(empty[:, None], blank, ids) for ids, blank in zip(pairs.tokens, view.empty_tokens, strict=True)
        )
        seen = see_pairs(view, frozen, dataclasses.replace(pairs, tokens=tokens), times, keys)
        seen = jax.lax.stop_gradient(seen)
        reference = None
        if objective.reads_reference:
            variables = reference_variables(state.trained, state.reference, frozen["unet"])
            reference = jax.lax.stop_gradient(predicted_noise(view, variables, seen))

        def loss_fn(trained: PyTree) -> tuple[jax.Array, tuple[GivenPairs, jax.Array, jax.Array]]:
            policy = predicted_noise(view, {"params": frozen["unet"], **trained}, seen)
            given = GivenPairs(errors_of(policy, reference, seen.noise), seen.tied, seen.usable)
            factor = jnp.ones(())
            if guard is not None:
                given, factor = guarded(given, guard)
            losses = objective.loss(given, options)
            return given.mean(losses), (given, losses, factor)

        (_, (given, losses, factor)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trained)
        metrics = DPOMetrics(
            sums=_sums(given, losses, objective, options),
            num_pairs=given.usable.sum(dtype=jnp.int32),
            grad_norm=optax.tree.norm(grads),
            guard=factor,
        )
        return state.apply_gradients(grads, optimizer), metrics

    return update


def rewards_of(errors: PairErrors, objective: Offline, options: LossOptions) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``implicit_rewards`` of B pairs, [B]: how much nearer the policy is to each image than the reference."""
    scale = objective.reward_scale * options.beta
    return implicit_rewards(errors.win_reference - errors.win, errors.lose_reference - errors.lose, scale)


def _sums(given: GivenPairs, losses: jax.Array, objective: Offline, options: LossOptions) -> dict[str, jax.Array]:
    """What is logged, summed over the usable pairs."""
    errors = given.errors
    values = {"loss": losses, ERRORS[0]: errors.win, ERRORS[1]: errors.lose}
    if objective.reads_reference:
        chosen, rejected, agreed = rewards_of(errors, objective, options)
        values |= {ERRORS[2]: errors.win_reference, ERRORS[3]: errors.lose_reference}
        values |= dict(zip(REWARDS, (chosen, rejected, chosen - rejected, agreed), strict=True))
    return {name: jnp.where(given.usable, value, 0.0).sum() for name, value in values.items()}


def dpo_metrics(updates: list[DPOMetrics], guard: bool) -> dict[str, float]:
    """What is logged of some updates: means over their pairs (0 if there is none), over updates of norm and guard."""
    updates = jax.device_get(updates)
    count = int(sum(m.num_pairs for m in updates))
    row = {name: float(np.sum([m.sums[name] for m in updates])) / max(count, 1) for name in updates[0].sums}
    row |= {"num_pairs": count, "grad_norm": float(np.mean([m.grad_norm for m in updates]))}
    return row | ({"guard": float(np.mean([m.guard for m in updates]))} if guard else {})
