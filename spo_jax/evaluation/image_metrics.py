"""The metrics of finished images by name. To add one: write a function that opens it and give it a name here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.errors import UserError
from spo_jax.evaluation.clip_metrics import (
    MetricOptions,
    in_batches,
    open_aesthetic,
    open_clip_score,
    open_hpsv2,
    open_pickscore,
    tokenizer_of,
)
from spo_jax.evaluation.identity import sha256_of_weights
from spo_jax.evaluation.image_metric import ImageMetric
from spo_jax.evaluation.imagereward import open_imagereward
from spo_jax.evaluation.metrics import colorfulness
from spo_jax.formats.hub import resolve_model
from spo_jax.formats.pipeline import read_clip
from spo_jax.formats.scorers import load_function
from spo_jax.formats.tokenizers import tokenize
from spo_jax.preference.scorers import make_clip_scorer

# ``(place, options) -> metric``: a folder, a file or a name on the hub, None for the published one at its commit.
# UserError if it is not there, or is another model.
OpenMetric = Callable[[str | None, MetricOptions], ImageMetric]


def open_scorer(place: str | None, options: MetricOptions) -> ImageMetric:
    """A preference model of this program's (``runs/spm/best``) at timestep 0, prepared as training does it."""
    if place is None:
        raise UserError("Metric scorer needs a preference model, for example --metrics=scorer=runs/spm/best.")
    clip, params = read_clip(place, step_aware=None, dtype=options.dtype)
    scorer = make_clip_scorer(clip)
    tokenizer, source = tokenizer_of(clip, resolve_model(place), options)
    encode = jax.jit(scorer.encode_text)

    @jax.jit
    def program(params: dict, images: jax.Array, texts: jax.Array) -> jax.Array:
        return scorer.score(params, images / 127.5 - 1, texts, jnp.zeros(len(images), jnp.int32))

    def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        if len({image.shape for image in images}) > 1:
            raise UserError("Metric scorer reads images of one size; these have several.")
        tokens = tokenize(tokenizer, list(prompts))
        texts = in_batches(functools.partial(encode, params), options.batch_size, tokens)
        rows = (image.astype(np.float32) for image in images)
        return in_batches(functools.partial(program, params), options.batch_size, rows, texts)

    settings = source | {"weights": place, "sha256": sha256_of_weights(place), "images": "8-bit", "timestep": 0}
    settings |= {"dtype": jnp.dtype(options.dtype).name}
    meaning = "What a preference model gives: of one that a model learned from it shows that training worked."
    return ImageMetric("Preference score", meaning, score, settings)


def open_colorfulness(place: str | None, options: MetricOptions) -> ImageMetric:
    """Colourfulness, see ``metrics.colorfulness``; it has no files."""
    del options
    if place is not None:
        raise UserError(f"Metric colorfulness has no files; leave ={place} out.")

    def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        del prompts
        return np.array([colorfulness(jnp.asarray(image / np.float32(127.5) - 1)) for image in images], np.float32)

    meaning = "Of the image alone; no measure of quality, but a large rise is a sign of oversaturated images."
    return ImageMetric("Colourfulness", meaning, score, {"images": "8-bit"}, ".1f", reads_prompts=False)


def open_function(place: str | None, options: MetricOptions) -> ImageMetric:
    """A user's function: ``(images, list of uint8 [H, W, 3]; prompts, list of str) -> n numbers``."""
    del options
    if place is None:
        raise UserError("Metric function needs a function, for example --metrics=function=my_module:score.")
    function: Callable[..., object] = load_function(place, "--metrics=function")

    def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        scores = np.asarray(function(list(images), list(prompts)), np.float32)
        if scores.shape != (len(images),):
            raise UserError(
                f"{place} gives {list(scores.shape)} numbers for {len(images)} images; it must give one each."
            )
        return scores

    return ImageMetric(place, "A function of the user's own.", score, {"function": place, "images": "8-bit"})


IMAGE_METRICS: dict[str, OpenMetric] = {
    "pickscore": open_pickscore,
    "hpsv2": functools.partial(open_hpsv2, "hpsv2"),
    "hpsv2.1": functools.partial(open_hpsv2, "hpsv2.1"),
    "imagereward": lambda place, options: open_imagereward(place, options.dtype, batch_size=options.batch_size),
    "aesthetic": open_aesthetic,
    "clip": functools.partial(open_clip_score, "clip"),
    "clip_h": functools.partial(open_clip_score, "clip_h"),
    "scorer": open_scorer,
    "colorfulness": open_colorfulness,
    "function": open_function,
}


def named_metrics(names: Iterable[str]) -> dict[str, str | None]:
    """``NAME`` or ``NAME=PLACE`` to the places by name; UserError for a name that there is not, or twice."""
    found: dict[str, str | None] = {}
    for text in names:
        name, sign, place = text.strip().partition("=")
        if name not in IMAGE_METRICS:
            raise UserError(f"--metrics: {name!r} is no metric; there are {', '.join(IMAGE_METRICS)}.")
        if name in found:
            raise UserError(f"--metrics names {name} twice; leave one.")
        if sign and not place:
            raise UserError(f"--metrics={text} has no place behind the sign; write {name}=FOLDER, or {name} alone.")
        found[name] = place or None
    return found


def open_metric(name: str, place: str | None, options: MetricOptions) -> ImageMetric:
    """Reads a metric's files; UserError if they are missing or another model's."""
    return IMAGE_METRICS[name](place, options)
