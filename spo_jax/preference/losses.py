"""The objectives, for one pair each: SPO (equation 6 with the clipping of the released code), and its judge's."""

from __future__ import annotations

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@flax.struct.dataclass
class PairLoss:
    """Scalars of one pair: loss, unclipped probability ratios of win and lose, and whether each was clipped."""

    loss: jax.Array
    win_ratio: jax.Array
    lose_ratio: jax.Array
    win_clipped: jax.Array
    lose_clipped: jax.Array


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

    return PairLoss(-jax.nn.log_sigmoid(beta * margin), win, lose, outside(win), outside(lose))


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
