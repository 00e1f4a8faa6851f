"""Scorers: which of several candidates or images is better (SPO, section 3.2).

    ImageScorer   images, text, timesteps  -> scores      a CLIP, or a function of the user
    Scorer        candidates of a pool     -> scores      what SPO asks; it decodes, if it has to

To add one that SPO can ask: write a function that makes a ``Scorer`` and give it a name in ``SCORERS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped
from ml_collections import ConfigDict

from spo_jax.distributed.pieces import map_in_pieces, piece_size
from spo_jax.models.clip import CLIPModel, CLIPTextTransformer
from spo_jax.types import Candidates

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageScorer(NamedTuple):
    """A scorer of images in two halves, so that a prompt's text is encoded once for all its images.

    Attributes:
      encode_text: ``(params, tokens int [n, L]) -> text``, an array with a row for each prompt that only ``score``
        reads: unit-length embeddings float32 [n, E] of a CLIP, the tokens themselves of a user's function.
      score: ``(params, images [n, H, W, 3] in [-1, 1], text, timesteps int [n]) -> float32 [n]``.
      tower: of a CLIP, the sizes of its text tower, to which a tokenizer has to be fitted.
    """

    encode_text: Callable[[PyTree, jax.Array], jax.Array]
    score: Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]
    tower: CLIPTextTransformer | None = None


# Scores of B prompts' k candidates each; the text has a row for each prompt.
ScoreCandidates = Callable[[dict[str, PyTree], Candidates, Shaped[Array, "b ..."]], Float[Array, "b k"]]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """What SPO asks which candidates are better.

    Attributes:
      encode_text: ``(params, tokens int [B, L]) -> text``, a row for each prompt, which only ``score`` reads.
      score: see ``ScoreCandidates``. It gets candidates and clean latents, and decodes if it has to.
      parts: names of the parameters that ``score`` reads.
      text_parts: names of those that ``encode_text`` reads.
      of_images: the scorer of images behind it, if there is one; evaluation asks it about finished images.
    """

    encode_text: Callable[[dict[str, PyTree], jax.Array], jax.Array]
    score: ScoreCandidates
    parts: tuple[str, ...] = ()
    text_parts: tuple[str, ...] = ()
    of_images: ImageScorer | None = None


class ScorerSetup(NamedTuple):
    """What is known where a ``Scorer`` is made.

    Attributes:
      config: ``config.scorer``.
      image_scorer: that ``config.scorer.path`` or ``fn`` names; its parameters are ``params["scorer"]``.
      decode: ``(params, latents [n, h, w, c]) -> images [n, H, W, 3]``; it reads ``params["vae"]``.
      num_devices: that split the B prompts.
    """

    config: ConfigDict
    image_scorer: ImageScorer | None
    decode: Callable[[dict[str, PyTree], jax.Array], jax.Array]
    num_devices: int


def image_candidates_scorer(setup: ScorerSetup) -> Scorer:
    """SPO's scorer: it decodes each candidate's clean latents and scores the image at the timestep it arrived at.

    ``config.scorer.step_aware = False`` tells it t = 0 whatever the timestep is, as in the paper's ablation;
    ``config.scorer.chunk`` is the most images that a device decodes and scores at a time, 0 for all of its images,
    which need more memory than anything else in sampling.
    """
    scorer, step_aware, chunk = setup.image_scorer, setup.config.step_aware, setup.config.chunk
    assert scorer is not None

    def encode_text(params: dict[str, PyTree], tokens: jax.Array) -> jax.Array:
        return scorer.encode_text(params["scorer"], tokens)

    def score(params: dict[str, PyTree], candidates: Candidates, text: jax.Array) -> jax.Array:
        def score_rows(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            latents, texts = rows
            timesteps = jnp.full((len(latents),), candidates.arrived if step_aware else 0)
            return scorer.score(params["scorer"], setup.decode(params, latents), texts, timesteps)

        x0 = candidates.x0
        batch, count = x0.shape[:2]
        rows = x0.reshape(batch * count, *x0.shape[2:]), jnp.repeat(text, count, axis=0)
        size = piece_size(batch * count, setup.num_devices, chunk)
        return map_in_pieces(score_rows, rows, size).reshape(batch, count)

    return Scorer(encode_text, score, parts=("vae", "scorer"), text_parts=("scorer",), of_images=scorer)


# By ``config.scorer.kind``. Only "image" needs a model or a function of the user's.
SCORERS: dict[str, Callable[[ScorerSetup], Scorer]] = {"image": image_candidates_scorer}


def preprocess_images(
    images: Float[Array, "n H W 3"], size: int, *, antialias: bool = False
) -> Float[Array, "n s s 3"]:
    """Images in [-1, 1] to CLIP's pixels: shorter side to ``size``, centre crop, clip to [0, 1], normalise.

    The resize is PyTorch's bicubic kernel (a = -0.75) without antialiasing, as the preference model was trained with;
    JAX's defaults differ from it by several standard deviations on noise. With ``antialias`` it is Pillow's (a = -0.5),
    as CLIP's own image processor has it.
    """
    count, height, width, channels = images.shape
    images = images.astype(jnp.float32)
    new_height, new_width = resized(height, width, size, antialias=antialias)
    if (new_height, new_width) != (height, width):
        shape = (count, new_height, new_width, channels)
        method = "bicubic" if antialias else "bicubic-pytorch"
        images = jax.image.resize(images, shape, method=method, antialias=antialias)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    images = images[:, top : top + size, left : left + size]
    return (jnp.clip(images / 2 + 0.5, 0.0, 1.0) - jnp.array(CLIP_MEAN)) / jnp.array(CLIP_STD)


def resized(height: int, width: int, size: int, *, antialias: bool) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes ``size``, see ``preprocess_images``.

    The longer side is rounded, or with ``antialias`` rounded down as CLIP's image processor has it. There the order
    counts: size * long / short is the exact quotient rounded once, long * (size / short) may fall below a whole number.
    """
    short = min(height, width)
    if antialias:
        return int(size * height / short), int(size * width / short)
    scale = size / short
    return int(height * scale + 0.5), int(width * scale + 0.5)


def make_clip_scorer(clip: CLIPModel, *, antialias: bool = False) -> ImageScorer:
    """The scorer of a CLIP, step-aware or plain: ``exp(logit_scale) * cosine(image, text)``.

    A plain CLIP is given the timesteps too, and does not look at them. ``antialias``: see ``preprocess_images``.
    """

    def encode_text(params: PyTree, tokens: jax.Array) -> jax.Array:
        return _unit(clip.apply({"params": params}, tokens, method=clip.text_features))

    def score(params: PyTree, images: jax.Array, text: jax.Array, timesteps: jax.Array) -> jax.Array:
        pixels = preprocess_images(images, clip.image_size, antialias=antialias)
        times = (timesteps,) if clip.step_aware else ()
        image = _unit(clip.apply({"params": params}, pixels, *times, method=clip.image_features))
        chex.assert_equal_shape([image, text])  # one text for all images would be broadcast
        return jnp.exp(params["logit_scale"].astype(jnp.float32)) * (image * text).sum(axis=-1)

    return ImageScorer(encode_text, score, clip.tower)


def make_function_scorer(function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> ImageScorer:
    """The scorer of a user's function, which has no parameters and reads the prompt's tokens itself.

    Args:
      function: ``(images float32 [n, H, W, 3] in [-1, 1], tokens int32 [n, L], timesteps int32 [n]) -> float32 [n]``.
        The decoder's overshoots are clipped before it sees them.
    """

    def encode_text(_params: PyTree, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(tokens, jnp.int32)

    def score(_params: PyTree, images: jax.Array, text: jax.Array, timesteps: jax.Array) -> jax.Array:
        return function(jnp.clip(images.astype(jnp.float32), -1.0, 1.0), text, timesteps.astype(jnp.int32))

    return ImageScorer(encode_text, score)


def _unit(features: jax.Array) -> jax.Array:
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def score_pairs(
    scorer: ImageScorer, params: PyTree, images: Float[Array, "b 2 H W 3"], text: jax.Array, timesteps: Int[Array, " b"]
) -> Float[Array, "b 2"]:
    """Scores of both images of each pair; ``text`` [b, ...] is what ``scorer.encode_text`` gave of the captions."""
    flat = images.reshape(-1, *images.shape[2:])
    scores = scorer.score(params, flat, jnp.repeat(text, 2, axis=0), jnp.repeat(timesteps, 2))
    return scores.reshape(-1, 2)
