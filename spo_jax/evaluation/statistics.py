"""Numbers of scores: means, differences, win rates and their intervals. NumPy only, float64 inside.

The independent thing is the prompt: images of one prompt resemble each other, so their scores are averaged inside the
prompt first, and the bootstrap draws prompts, not images. Both models of a comparison have the same prompts and the
same initial noise, so it draws their differences (it is paired), and an interval is as narrow as the data allow.

There are two win rates, and they are different numbers. That **of seed means** asks on which part of the prompts a
model's mean over the seeds is higher. That **of images** compares image with image of the same seed, averages inside a
prompt and then over the prompts. Ties count half in both.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
_PIECE_ELEMENTS = 2**21  # of a piece of the bootstrap: prompts drawn, 8 bytes each


class Counts(NamedTuple):
    """How often a model has more, as much, and less than the one that it is compared with."""

    won: int
    tied: int
    lost: int


class Benchmark(NamedTuple):
    """HPSv2's table: means and spreads float64 [styles], and the mean of all images."""

    means: np.ndarray
    spreads: np.ndarray
    average: float


def seed_means(scores: np.ndarray) -> np.ndarray:
    """Means over the seeds, [..., prompts, seeds] to float64 [..., prompts]."""
    return np.asarray(scores, np.float64).mean(-1)


def standard_error(values: np.ndarray) -> float | None:
    """The standard error of the mean of ``values`` [prompts], with n - 1; None of a single one, which has no spread."""
    values = np.asarray(values, np.float64)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def prompt_wins(model: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Whether the seed means of ``model`` beat those of ``first``, 1, 0.5 for a tie, or 0.

    Args:
      model: scores [prompts, seeds].
      first: those of the model that it is compared with, for the same prompts and seeds.

    Returns:
      float64 [prompts]; their mean is the win rate of seed means.
    """
    return _wins(seed_means(model) - seed_means(first))


def image_wins(model: np.ndarray, first: np.ndarray) -> np.ndarray:
    """On which part of a prompt's seeds ``model`` beats ``first``, a tie counts half.

    The arguments are those of ``prompt_wins``; the mean of the returned float64 [prompts] is the win rate of images.
    """
    return _wins(np.asarray(model, np.float64) - np.asarray(first, np.float64)).mean(-1)


def count_prompts(model: np.ndarray, first: np.ndarray) -> Counts:
    """How many prompts the seed means of ``model`` win, tie and lose, see ``prompt_wins``."""
    return _count(seed_means(model) - seed_means(first))


def count_images(model: np.ndarray, first: np.ndarray) -> Counts:
    """How many single images ``model`` wins, ties and loses, see ``image_wins``."""
    return _count(np.asarray(model, np.float64) - np.asarray(first, np.float64))


def _wins(differences: np.ndarray) -> np.ndarray:
    return (np.sign(differences) + 1) / 2


def _count(differences: np.ndarray) -> Counts:
    return Counts(*(int(np.sum(np.sign(differences) == sign)) for sign in (1, 0, -1)))


def resampled_means(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Means of ``values`` [..., prompts] over the prompts ``index`` int [resamples, prompts], as [..., resamples].

    It counts how often each prompt was drawn and multiplies, so that all values share the work of drawing.
    """
    rows, prompts = index.shape
    places = index.astype(np.int64) + np.arange(rows)[:, None] * prompts
    drawn = np.bincount(places.ravel(), minlength=rows * prompts).reshape(rows, prompts).astype(np.float64)
    return np.asarray(values, np.float64) @ drawn.T / prompts


def bootstrap_means(
    values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, piece: int | None = None
) -> np.ndarray:
    """Means of prompts that are drawn with replacement.

    Args:
      values: [..., prompts]; differences of two models, wins, or scores. All leading axes share the draws.
      resamples: how often as many prompts are drawn as there are.
      seed: of the draws. The same seed, number of prompts and ``resamples`` give the same draws.
      piece: resamples at a time; the result does not depend on it beyond rounding. By default, what keeps the
        draws below 32 MB.

    Returns:
      float64 [..., resamples].
    """
    values = np.asarray(values, np.float64)
    prompts = values.shape[-1]
    piece = piece or max(1, _PIECE_ELEMENTS // prompts)
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, piece):
        index = generator.integers(prompts, size=(min(piece, resamples - start), prompts))
        parts.append(resampled_means(values, index))
    return np.concatenate(parts, -1)


def percentile_interval(means: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """The middle part ``level`` of resampled means [..., resamples], linear between ranks, as [..., 2]."""
    tail = 50 * (1 - level)
    return np.moveaxis(np.percentile(means, [tail, 100 - tail], axis=-1), 0, -1)


def wilson_interval(wins: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of one win rate; ties make ``wins`` a half more. It needs no draws and holds near 0 and 1.

    Args:
      wins: 0 to ``count``.
      count: independent comparisons: prompts, not images.
      level: such as 0.95.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate, scale = wins / count, 1 + z**2 / count
    centre = (rate + z**2 / (2 * count)) / scale
    half = z / scale * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def hpsv2_benchmark(scores: np.ndarray, groups: int = 10) -> Benchmark:
    """HPSv2's table of four styles of 800 prompts, one image each, as its authors compute it.

    The spread is the population standard deviation of the means of ten groups of 80 prompts in a row. It is not a
    standard error; divided by the root of ten it is one.

    Args:
      scores: [styles, prompts], prompts in the order of the benchmark. The table shows cosines times 100.
      groups: into which the prompts of a style are cut; it has to divide their number.
    """
    scores = np.asarray(scores, np.float64)
    of_groups = scores.reshape(len(scores), groups, -1).mean(-1)
    return Benchmark(of_groups.mean(-1), of_groups.std(-1), float(scores.mean()))


def disagreement(differences: np.ndarray) -> np.ndarray:
    """How far metrics disagree about an image: the difference between the one most and the one least in favour.

    Each metric's differences are divided by their standard deviation over all images, so that metrics of any scale
    compare; they are not centred, so that 0 stays a tie. A metric that never changes counts as a tie everywhere.

    Args:
      differences: of a model's score and the first model's, [metrics, prompts, seeds].

    Returns:
      float64 [prompts, seeds], >= 0; all 0 for one metric.
    """
    differences = np.asarray(differences, np.float64)
    spread = differences.std((1, 2), keepdims=True)
    varies = spread > 1e-12 * np.abs(differences).max((1, 2), keepdims=True)  # not only by rounding
    standardised = np.divide(differences, spread, out=np.zeros_like(differences), where=varies)
    return standardised.max(0) - standardised.min(0)
