"""Metrics: scores of finished images and their prompts. Summary, report, CSV and plan go through what a config names.

To add one: write a function that makes a ``Metric`` and give it a name in ``METRICS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped

from spo_jax.preference.scorers import ImageScorer
from spo_jax.types import Tokenizer

EncodeText = Callable[[dict[str, PyTree], jax.Array], jax.Array]  # (params, tokens int [n, L]) -> [n, ...]


# ``(params, images in [-1, 1], texts of all N prompts, numbers) -> scores``, numbers or truth values; ``numbers`` are
# the places of the images' prompts among all N.
ScoreImages = Callable[
    [dict[str, PyTree], Float[Array, "n H W 3"], Shaped[Array, "N ..."] | None, Int[Array, " n"]], Shaped[Array, " n"]
]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A score of finished images, higher is better.

    Attributes:
      score: see ``ScoreImages``.
      title: of it in a report.
      meaning: a sentence for the report.
      form: how a mean is written, such as ".2f".
      parts: names of the parameters that it reads.
      encode_text: ``(params, tokens int [n, L]) -> [n, ...]``; None if it does not read prompts.
      tokenizer: of the prompts.
      compares: whether it can say which of two images of a prompt is better; if so a win rate is reported.
    """

    score: ScoreImages
    title: str
    meaning: str
    form: str = ".2f"
    parts: tuple[str, ...] = ()
    encode_text: EncodeText | None = None
    tokenizer: Tokenizer | None = None
    compares: bool = True


class Described(Protocol):
    """What is said of a metric, and whether it compares images of a prompt; a ``Metric`` or an ``ImageMetric``."""

    @property
    def title(self) -> str: ...
    @property
    def meaning(self) -> str: ...
    @property
    def form(self) -> str: ...
    @property
    def compares(self) -> bool: ...


class NamedScorer(NamedTuple):
    """A scorer of images, the name of its parameters, and the tokenizer of its texts."""

    scorer: ImageScorer
    part: str
    tokenizer: Tokenizer


class MetricSetup(NamedTuple):
    """What metrics are made from.

    Attributes:
      preference: opens the run's scorer of images; UserError if its scorer reads latents only.
      clip: opens the plain CLIP of ``config.evaluation.judge``.
    """

    preference: Callable[[], NamedScorer]
    clip: Callable[[], NamedScorer]


def preference_score(setup: MetricSetup) -> Metric:
    """The score of the run's own scorer at timestep 0."""
    scorer, part, tokenizer = setup.preference()

    def score(params: dict[str, PyTree], images: jax.Array, texts: jax.Array | None, numbers: jax.Array) -> jax.Array:
        assert texts is not None
        return scorer.score(params[part], images, texts[numbers], jnp.zeros_like(numbers))

    return Metric(
        score,
        "Preference score",
        "What the scorer gives that the model learned from: it shows that training worked, not that people agree.",
        parts=(part,),
        encode_text=lambda params, tokens: scorer.encode_text(params[part], tokens),
        tokenizer=tokenizer,
    )


def alignment_top1(setup: MetricSetup) -> Metric:
    """Whether an image's own prompt is the nearest of all N, by a plain CLIP."""
    scorer, part, tokenizer = setup.clip()

    def score(params: dict[str, PyTree], images: jax.Array, texts: jax.Array | None, numbers: jax.Array) -> jax.Array:
        assert texts is not None

        def similarity(text: jax.Array) -> jax.Array:
            text = jnp.broadcast_to(text, (len(images), *text.shape))
            return scorer.score(params[part], images, text, jnp.zeros_like(numbers))

        return jax.vmap(similarity)(texts).argmax(axis=0) == numbers

    return Metric(
        score,
        "Text alignment",
        "How often a CLIP finds an image's own prompt among all of these. It should hardly drop.",
        form=".1%",
        parts=(part,),
        encode_text=lambda params, tokens: scorer.encode_text(params[part], tokens),
        tokenizer=tokenizer,
        compares=False,
    )


def colorfulness_metric(_setup: MetricSetup) -> Metric:
    """``colorfulness``, which no scorer is asked for."""
    return Metric(
        lambda params, images, texts, numbers: colorfulness(images),
        "Colourfulness",
        "Of the image alone; no measure of quality, but a large rise is a sign of oversaturated images.",
        form=".1f",
    )


# By name, for ``config.evaluation.metrics``.
METRICS: dict[str, Callable[[MetricSetup], Metric]] = {
    "preference_score": preference_score,
    "alignment_top1": alignment_top1,
    "colorfulness": colorfulness_metric,
}


def colorfulness(images: Float[Array, "*n h w 3"]) -> Float[Array, "*n"]:
    """Colourfulness metric M3 of each image.

    With the opponent axes ``rg = R - G`` and ``yb = (R + G) / 2 - B`` it is
    ``sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)``, on pixel values of 0 to 255. Gray images
    score 0, about 15 is "slightly colourful", about 109 "extremely colourful". Values outside [-1, 1], as a decoder may
    give them, are clipped first, because a stored image could not show them.

    Args:
        images: RGB values in [-1, 1], any leading axes, any float type.

    Returns:
        One float32 score >= 0 per image, in units of 8-bit pixel values.

    Source: D. Hasler and S. Suesstrunk, "Measuring colourfulness in natural images", SPIE 5007, 2003.
    """
    red, green, blue = jnp.moveaxis((jnp.clip(images.astype(jnp.float32), -1, 1) + 1) * 127.5, -1, 0)
    red_green = red - green
    yellow_blue = 0.5 * (red + green) - blue
    axes = (-2, -1)
    spread = jnp.sqrt(red_green.var(axes) + yellow_blue.var(axes))
    offset = jnp.sqrt(red_green.mean(axes) ** 2 + yellow_blue.mean(axes) ** 2)
    return spread + 0.3 * offset


def meaning_of(name: str, metric: Described, model: str) -> str:
    """What a report says of a metric of a model; the emoji world's simulated people prefer colourfulness."""
    if name == "colorfulness" and model.startswith("emoji:"):
        return "It is the true preference of the emoji world, which training knows only through a scorer or labels."
    return metric.meaning
