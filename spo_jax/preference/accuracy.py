"""Pairwise accuracy: how often a scorer prefers the image that people preferred, and how sure that is.

Everything is a sum over pairs, so that batches and hosts add up: ``jax.tree.map(operator.add, a, b)``.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_Z = NormalDist().inv_cdf(0.975)


@flax.struct.dataclass
class Accuracy:
    """Sums over the pairs of one scorer.

    Attributes:
      agreed: pairs whose preferred picture has the higher score; equal scores count one half.
      count: pairs with a preferred picture.
      ties: pairs whose labels are equal; they are left out of the accuracy.
    """

    agreed: jax.Array
    count: jax.Array
    ties: jax.Array

    @property
    def value(self) -> float:
        """The accuracy, in [0, 1]; NaN without a pair, or where scores have no order."""
        return float(self.agreed) / float(self.count) if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (Wilson); [0, 1] without a pair."""
        return wilson_interval(float(self.agreed), float(self.count))


@flax.struct.dataclass
class Difference:
    """Sums over the same pairs of two scorers: of ``d = agreement - agreement of the other`` and of its square."""

    total: jax.Array
    squares: jax.Array
    count: jax.Array

    @property
    def value(self) -> float:
        """The difference of the two accuracies, in [-1, 1]; NaN without a pair, or where scores have no order."""
        return float(self.total) / float(self.count) if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The paired 95 % interval of the difference (Agresti and Min); [-1, 1] without a pair."""
        return paired_interval(float(self.total), float(self.squares), float(self.count))


def agreement(scores: Float[Array, "n 2"], labels: Float[Array, "n 2"]) -> Float[Array, " n"]:
    """1 where the picture with the larger label has the higher score, 0 where it has the lower, else 1/2.

    Labels may be hard (1 and 0), soft, or a tie. Scores that have no order (NaN, or both infinite) give NaN.
    """
    return 0.5 + 0.5 * jnp.sign(scores[:, 0] - scores[:, 1]) * jnp.sign(labels[:, 0] - labels[:, 1])


def count_accuracy(scores: Float[Array, "n 2"], labels: Float[Array, "n 2"], mask: Bool[Array, " n"]) -> Accuracy:
    """The sums of a batch of which only the pairs in ``mask`` count."""
    preferred = mask & (labels[:, 0] != labels[:, 1])
    agreed = jnp.where(preferred, agreement(scores, labels), 0.0).sum()
    return Accuracy(agreed, preferred.sum(), (mask & ~preferred).sum())


def count_difference(
    scores: Float[Array, "n 2"], other: Float[Array, "n 2"], labels: Float[Array, "n 2"], mask: Bool[Array, " n"]
) -> Difference:
    """The sums of a batch for the scorer that gave ``scores`` against the one that gave ``other``."""
    preferred = mask & (labels[:, 0] != labels[:, 1])
    difference = jnp.where(preferred, agreement(scores, labels) - agreement(other, labels), 0.0)
    return Difference(difference.sum(), jnp.square(difference).sum(), preferred.sum())


def wilson_interval(successes: float, count: float) -> tuple[float, float]:
    """95 % interval of a proportion; ``successes`` may be a multiple of one half.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    if not count:
        return 0.0, 1.0
    p, square = successes / count, _Z**2 / count
    centre = (p + square / 2) / (1 + square)
    half = math.sqrt(square * (p * (1 - p) + square / 4)) / (1 + square)
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def paired_interval(total: float, squares: float, count: float) -> tuple[float, float]:
    """95 % interval of the mean of paired differences in [-1, 1], given their sum, sum of squares and number.

    It is the normal interval after two more pairs, on one of which each scorer is right alone half the time: so that it
    keeps its width where the scorers differ on few pairs or on none.

    Source: A. Agresti and Y. Min, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24, 2005.
    """
    if not count:
        return -1.0, 1.0
    mean = total / (count + 2)
    half = _Z * math.sqrt(((squares + 1) / (count + 2) - mean**2) / (count + 2))
    return max(-1.0, mean - half), min(1.0, mean + half)
