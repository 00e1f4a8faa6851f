"""Objectives, for one pair each. To add one, write a function and name it in ``OBJECTIVES`` or ``ON_GIVEN_PAIRS``.

    sampled pair: two transitions from one latent, by their log-probabilities     SPO, GradSPO
    given pair:   two images with people's choice, by their errors                Diffusion-DPO and its kin

An objective on given pairs can be used on sampled ones as well: the error of a transition is its negative
log-probability. Those that see a whole batch of given pairs stand in ``offline.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.diffusion.process import Process, log_prob
from spo_jax.types import PreferencePairs


@flax.struct.dataclass
class PairLoss:
    """Scalars of one pair.

    Attributes:
      loss: what is learned from.
      win_ratio, lose_ratio: probability ratios of policy to reference, unclipped.
      win_clipped, lose_clipped: 1 where the ratio was clipped, else 0.
      win_reward, lose_reward: the implicit rewards, log-ratios times the strength of the preference, unclipped.
      agreed: 1 where the better one has the higher reward, 0.5 where they are equal, else 0.
    """

    loss: jax.Array
    win_ratio: jax.Array
    lose_ratio: jax.Array
    win_clipped: jax.Array
    lose_clipped: jax.Array
    win_reward: jax.Array
    lose_reward: jax.Array
    agreed: jax.Array


class LossOptions(NamedTuple):
    """``config.loss``, and the eta of the sampling that made the pairs."""

    beta: float = 10.0
    clip_range: float = 0.1
    eta: float = 1.0


@flax.struct.dataclass
class PairOutputs:
    """Guided outputs for one pair.

    Attributes:
      policy: float32 [h, w, c] where win and lose share x_t, otherwise [2, h, w, c], that of win first.
      reference: the same, of the model before training.
      average: the same, of the average of what is trained; None if the objective does not read it.
    """

    policy: jax.Array
    reference: jax.Array
    average: jax.Array | None = None


@flax.struct.dataclass
class PairErrors:
    """Distances of policy and reference to the two images of a pair, or to its two transitions: float32 scalars.

    Of given images a distance is the mean squared error of the predicted noise.

    Attributes:
      win, lose: of the policy.
      win_reference, lose_reference: of the reference.
      shift: of policy and reference from each other, on the better image; None for transitions.
      overlap: mean product of the policy's two residuals, of the better and of the worse image; None for transitions.
    """

    win: jax.Array
    lose: jax.Array
    win_reference: jax.Array
    lose_reference: jax.Array
    shift: jax.Array | None = None
    overlap: jax.Array | None = None


DMPO_ALPHA = 0.01  # of ``dmpo``

PairObjective = Callable[[Process, PairOutputs, PreferencePairs, LossOptions], PairLoss]  # of one sampled pair


class Objective(NamedTuple):
    """An objective.

    Attributes:
      loss: of one pair.
      reads_average: it reads the output of the average of what is trained, and pools are sampled with that.
      one_start: win and lose must share x_t, so there may be no inner steps.
    """

    loss: PairObjective
    reads_average: bool = False
    one_start: bool = False


# ------------------------------------------------------------------------------------------------------- sampled pairs
def spo(process: Process, outputs: PairOutputs, pair: PreferencePairs, options: LossOptions) -> PairLoss:
    """SPO, equation 6: log-probability ratios of the two transitions, clipped as in the released code."""
    errors = transition_errors(process, outputs, pair, options.eta)
    return spo_loss(
        errors.win_reference - errors.win,
        errors.lose_reference - errors.lose,
        beta=options.beta,
        clip_range=options.clip_range,
    )


def gradspo(process: Process, outputs: PairOutputs, pair: PreferencePairs, options: LossOptions) -> PairLoss:
    """GradSPO (NeurIPS 2025): the average's noise prediction, moved by the pair's noise, is what win and lose aim at.

    With ``z = (x_w - x_l) / (2 sigma)`` the targets are ``eps_average -+ 0.5 sqrt(1 - alpha) z``; a log-ratio is the
    mean squared distance of the reference to the target, less that of the policy. Win and lose have to share x_t.
    """
    chex.assert_equal_shape([outputs.policy, pair.win])
    step = process.transition(pair.win, pair.win, pair.timesteps, pair.previous_timesteps, options.eta)
    noise = (pair.win - pair.lose) / (2.0 * step.sigma)
    shift = 0.5 * process.add_noise(jnp.zeros_like(noise), noise, pair.timesteps)

    def noise_of(output: jax.Array) -> jax.Array:
        return process.to_x0_and_noise(output, pair.latents, pair.timesteps)[1]

    policy, reference = noise_of(outputs.policy), noise_of(outputs.reference)
    assert outputs.average is not None
    average = jax.lax.stop_gradient(noise_of(outputs.average))

    def log_ratio(target: jax.Array) -> jax.Array:
        return jnp.square(reference - target).mean() - jnp.square(policy - target).mean()

    win, lose = log_ratio(average - shift), log_ratio(average + shift)
    return spo_loss(win, lose, beta=options.beta, clip_range=options.clip_range)


def transition_errors(process: Process, outputs: PairOutputs, pair: PreferencePairs, eta: float) -> PairErrors:
    """Negative log-probabilities of the two transitions of a pair under policy and reference.

    Win and lose share the timestep and the prompt. Where they share x_t too, one output serves both.
    """

    def errors(output: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(of_one: jax.Array, latents: jax.Array):
            predicted = process.to_x0_and_noise(of_one, latents, pair.timesteps)
            return process.transition(*predicted, pair.timesteps, pair.previous_timesteps, eta)

        if pair.lose_latents is None:
            win = lose = step(output, pair.latents)
        else:
            win, lose = step(output[0], pair.latents), step(output[1], pair.lose_latents)
        return -log_prob(pair.win, win), -log_prob(pair.lose, lose)

    return PairErrors(*errors(outputs.policy), *errors(outputs.reference))


def spo_loss(
    win_log_ratio: Float[Array, ""], lose_log_ratio: Float[Array, ""], *, beta: float = 10.0, clip_range: float = 0.1
) -> PairLoss:
    """``-log sigmoid(beta (log r_win - log r_lose))`` with both ratios clamped to ``1 -+ clip_range``.

    Args:
      win_log_ratio: ``log p_policy(win) - log p_reference(win)``, log-probabilities averaged over latent elements.
      lose_log_ratio: the same of the worse sample.
      beta: strength of the preference.
      clip_range: outside of it the gradient is zero.

    Returns:
      The loss, which starts at log 2 and, with the defaults, lies in [0.126, 2.133]; and what to log.
    """
    win, lose = jnp.exp(win_log_ratio), jnp.exp(lose_log_ratio)
    low, high = 1.0 - clip_range, 1.0 + clip_range
    margin = jnp.log(jnp.clip(win, low, high)) - jnp.log(jnp.clip(lose, low, high))

    def outside(ratio: jax.Array) -> jax.Array:
        return ((ratio < low) | (ratio > high)).astype(jnp.float32)

    rewards = implicit_rewards(win_log_ratio, lose_log_ratio, beta)
    return PairLoss(-jax.nn.log_sigmoid(beta * margin), win, lose, outside(win), outside(lose), *rewards)


def implicit_rewards(win: jax.Array, lose: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rewards of better and worse, of two log-ratios or gains, and ``agreed`` of ``PairLoss``; of one pair or many."""
    return scale * win, scale * lose, 0.5 * (1.0 + jnp.sign(win - lose))


# --------------------------------------------------------------------------------------------------------- given pairs
def logit(errors: PairErrors, options: LossOptions) -> Float[Array, "*b"]:
    """``u = -beta / 2 ((e_w - e_l) - (r_w - r_l))`` of Diffusion-DPO, of one pair or of many.

    Errors are means, so beta is that of the authors' code.
    """
    return -0.5 * options.beta * ((errors.win - errors.lose) - (errors.win_reference - errors.lose_reference))


def dpo(errors: PairErrors, options: LossOptions) -> PairLoss:
    """Diffusion-DPO (arXiv 2311.12908): ``-log sigmoid(u)``, without clipping."""
    return of_loss(-jax.nn.log_sigmoid(logit(errors, options)), errors, options)


def ipo(errors: PairErrors, options: LossOptions) -> PairLoss:
    """IPO (arXiv 2310.12036): the margin of errors is pulled to ``1 / beta`` instead of being pushed without end."""
    margin = (errors.lose - errors.lose_reference) - (errors.win - errors.win_reference)
    return of_loss(jnp.square(margin - 1.0 / options.beta), errors, options)


def hinge(errors: PairErrors, options: LossOptions) -> PairLoss:
    """``relu(1 - u)``: a pair that is right by enough teaches nothing more."""
    return of_loss(jax.nn.relu(1.0 - logit(errors, options)), errors, options)


def dmpo(errors: PairErrors, options: LossOptions) -> PairLoss:
    """DMPO (as in Diffusion-SDPO's code): KL divergence of ``p = sigmoid(u)`` from 0.99."""
    u, aim = logit(errors, options), 1.0 - DMPO_ALPHA
    p = jax.nn.sigmoid(u)
    win = p * (jax.nn.log_sigmoid(u) - math.log(aim))
    return of_loss(win + (1.0 - p) * (jax.nn.log_sigmoid(-u) - math.log1p(-aim)), errors, options)


def of_loss(loss: Float[Array, ""], errors: PairErrors, options: LossOptions) -> PairLoss:
    """The loss, with ratios and rewards of an objective that does not clip."""
    win, lose = errors.win_reference - errors.win, errors.lose_reference - errors.lose
    rewards = implicit_rewards(win, lose, 0.5 * options.beta)
    return PairLoss(loss, jnp.exp(win), jnp.exp(lose), jnp.zeros(()), jnp.zeros(()), *rewards)


ON_GIVEN_PAIRS: dict[str, Callable[[PairErrors, LossOptions], PairLoss]] = {
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "dmpo": dmpo,
}


def on_sampled_pairs(loss: Callable[[PairErrors, LossOptions], PairLoss]) -> Objective:
    """An objective on given pairs, used on sampled ones."""

    def of_transitions(process: Process, outputs: PairOutputs, pair: PreferencePairs, options: LossOptions) -> PairLoss:
        return loss(transition_errors(process, outputs, pair, options.eta), options)

    return Objective(of_transitions)


# By ``config.loss.kind``.
OBJECTIVES: dict[str, Objective] = {
    "spo": Objective(spo),
    "gradspo": Objective(gradspo, reads_average=True, one_start=True),
    **{name: on_sampled_pairs(loss) for name, loss in ON_GIVEN_PAIRS.items()},
}


# ----------------------------------------------------------------------------------------------------- of a scorer
def preference_loss(scores: Float[Array, " 2"], labels: Float[Array, " 2"]) -> Float[Array, ""]:
    """What a preference model learns from: cross-entropy of its two scores with the labels (SPO, section 3.2).

    Args:
      scores: of the two pictures.
      labels: 1 and 0, or 0 and 1; 0.5 and 0.5 for a tie.

    Returns:
      ``-sum(labels log softmax(scores))``; for a tie less log 2, so that equal scores cost nothing.

    Raises:
      AssertionError: scores or labels are not of one pair.
    """
    chex.assert_shape([scores, labels], (2,))
    cross_entropy = -(labels * jax.nn.log_softmax(scores.astype(jnp.float32))).sum()
    return cross_entropy + jnp.where(labels[0] == labels[1], jnp.log(0.5), 0.0)
