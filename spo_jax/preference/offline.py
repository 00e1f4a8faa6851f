"""Objectives on a batch of given pairs: what ``config.loss.kind`` of the method ``dpo`` may be.

Errors are means over an image's latent elements, so beta is that of the authors' code; arXiv 2311.12908 prints sums.
Most are objectives of one pair (``losses.py``); two read a mean over the batch. To add one, write a function and name
it in ``OFFLINE``, or an objective of one pair and name it in ``ON_GIVEN_PAIRS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.preference.losses import ON_GIVEN_PAIRS, LossOptions, PairErrors, logit

MAPO_SNR, MAPO_STEPS = 0.5, 1000.0
DSPO_SHIFT = 0.1  # of the batch, from which on the code for SDXL weighs the shift


@flax.struct.dataclass
class GivenPairs:
    """What an objective sees of B pairs.

    Attributes:
      errors: fields float32 [B].
      tied: bool [B], where people had no preference; the first image then stands as the better one.
      usable: bool [B], rows that count; the others only fill up.
    """

    errors: PairErrors
    tied: jax.Array
    usable: jax.Array

    def mean(self, values: Float[Array, " b"]) -> Float[Array, ""]:
        """The mean over the usable pairs; 0 if there is none."""
        return jnp.where(self.usable, values, 0.0).sum() / jnp.maximum(self.usable.sum(), 1)


class Offline(NamedTuple):
    """An objective on a batch of given pairs.

    Attributes:
      loss: losses [B] of the pairs; the mean over the usable ones is learned from.
      beta: strength of the preference in the published recipe, which ``config.loss.beta`` may replace.
      reads_reference: it reads the reference's errors.
      reward_scale: the implicit reward of an image is this times beta times (reference's error - policy's error).
    """

    loss: Callable[[GivenPairs, LossOptions], Float[Array, " b"]]
    beta: float
    reads_reference: bool = True
    reward_scale: float = 0.5


def of_each(name: str) -> Callable[[GivenPairs, LossOptions], Float[Array, " b"]]:
    """An objective of one pair, on each pair of a batch."""
    one = ON_GIVEN_PAIRS[name]
    return lambda pairs, options: jax.vmap(lambda errors: one(errors, options).loss)(pairs.errors)


def sft(pairs: GivenPairs, _options: LossOptions) -> Float[Array, " b"]:
    """Supervised fine-tuning on the better image."""
    return pairs.errors.win


def mapo(pairs: GivenPairs, options: LossOptions) -> Float[Array, " b"]:
    """MaPO (arXiv 2406.06424), without a reference: ``e_w - beta log sigmoid(1000 (f(e_w) - f(e_l)))``."""

    def weigh(error: jax.Array) -> jax.Array:
        """``f(e) = s e / (exp(s e) - 1)``, which is 1 at 0; the quotient alone would lose its digits there."""
        scaled = MAPO_SNR * error
        near = scaled < 1e-3
        apart = jnp.where(near, 1.0, scaled)
        return jnp.where(near, 1.0 - scaled / 2 + jnp.square(scaled) / 12, apart / jnp.expm1(apart))

    margin = MAPO_STEPS * (weigh(pairs.errors.win) - weigh(pairs.errors.lose))
    return pairs.errors.win - options.beta * jax.nn.log_sigmoid(margin)


def kto(pairs: GivenPairs, options: LossOptions) -> Float[Array, " b"]:
    """Diffusion-KTO (arXiv 2404.04465), each image by itself: gains are measured from the batch's mean gain.

    With gains ``g = r - e`` and ``z = max(0, mean of g)``, without a gradient, an image that somebody preferred costs
    ``1 - sigmoid(beta (g - z))`` and another one ``1 - sigmoid(-beta (g - z))``. Of a tie both are preferred.
    """
    errors = pairs.errors
    win, lose = errors.win_reference - errors.win, errors.lose_reference - errors.lose
    zero = jax.lax.stop_gradient(jnp.maximum(pairs.mean((win + lose) / 2), 0.0))
    sign = jnp.where(pairs.tied, 1.0, -1.0)
    worse = jax.nn.sigmoid(-sign * options.beta * (lose - zero))
    return (jax.nn.sigmoid(-options.beta * (win - zero)) + worse) / 2


def dspo(pairs: GivenPairs, options: LossOptions) -> Float[Array, " b"]:
    """DSPO, the code for SD1.5: ``mean square of (residual_w - beta (1 - sigmoid(u)) (output_w - reference_w))``.

    The square is multiplied out: the residuals' product is ``(e_w - r_w + shift) / 2``.
    """
    errors = pairs.errors
    weight = options.beta * (1.0 - jax.nn.sigmoid(logit(errors, options)))
    assert errors.shift is not None
    product = (errors.win - errors.win_reference + errors.shift) / 2
    return errors.win - 2 * weight * product + jnp.square(weight) * errors.shift


def dspo_sdxl(pairs: GivenPairs, options: LossOptions) -> Float[Array, " b"]:
    """DSPO, the code for SDXL, which is not what its paper has: ``s^2 shift``, or ``s^2`` while the shift is small."""
    errors = pairs.errors
    square = jnp.square(1.0 - jax.nn.sigmoid(logit(errors, options)))
    assert errors.shift is not None
    return jnp.where(pairs.mean(errors.shift) >= DSPO_SHIFT, square * errors.shift, square)


# By ``config.loss.kind``; what one pair alone decides on comes from ``losses.py``.
OFFLINE: dict[str, Offline] = {
    "sft": Offline(sft, 1.0, reads_reference=False),
    **{name: Offline(of_each(name), 5000.0) for name in ON_GIVEN_PAIRS},
    "dmpo": Offline(of_each("dmpo"), 2000.0),
    "dspo": Offline(dspo, 0.001),
    "dspo_sdxl": Offline(dspo_sdxl, 5000.0),
    "mapo": Offline(mapo, 0.1, reads_reference=False),
    "kto": Offline(kto, 1000.0, reward_scale=1.0),
}


def guarded(pairs: GivenPairs, strength: float) -> tuple[GivenPairs, Float[Array, ""]]:
    """The loser guard of Diffusion-SDPO: values stay, the gradient through the losers' errors is scaled down.

    What the losers push away may not undo what the winners gain: with the gradients g of the batch's mean errors with
    respect to the outputs, the factor is ``clip((1 - strength) |g_w|^2 / (g_l . g_w), 0, 1)`` if that product is
    positive, else 1. One factor holds for the whole minibatch.

    Returns:
      The pairs, and the factor.

    Raises:
      AssertionError: the errors have no ``overlap``.
    """
    errors = pairs.errors
    assert errors.overlap is not None
    along, towards = pairs.mean(errors.win), pairs.mean(errors.overlap)
    cap = (1.0 - strength) * along / jnp.where(towards > 0, towards + 1e-9, 1.0)
    factor = jax.lax.stop_gradient(jnp.where(towards > 0, jnp.clip(cap, 0.0, 1.0), 1.0))
    still = jax.lax.stop_gradient(errors.lose)
    errors = dataclasses.replace(errors, lose=still + factor * (errors.lose - still))
    return dataclasses.replace(pairs, errors=errors), factor
