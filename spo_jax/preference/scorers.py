"""Judges of pictures: ``score(params, images, text, timesteps) -> scores`` (SPO, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Scorer(NamedTuple):
    """A judge in two halves, so that a prompt's text is encoded once for all its candidates.

    Attributes:
      encode_text: ``(params, tokens int [n, L]) -> text``, an array with a row for each prompt that only ``score``
        reads: unit-length embeddings float32 [n, E] of a CLIP, the tokens themselves of a user's function.
      score: ``(params, images [n, H, W, 3] in [-1, 1], text, timesteps int [n]) -> float32 [n]``.
      tower: of a CLIP, the sizes of its text tower, to which a tokenizer has to be fitted.
    """

    encode_text: Callable[[Any, jax.Array], jax.Array]
    score: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
    tower: Any = None


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
    """Height and width of a picture whose shorter side becomes ``size``, see ``preprocess_images``.

    The longer side is rounded, or with ``antialias`` rounded down as CLIP's image processor has it. There the order
    counts: size * long / short is the exact quotient rounded once, long * (size / short) may fall below a whole number.
    """
    short = min(height, width)
    if antialias:
        return int(size * height / short), int(size * width / short)
    scale = size / short
    return int(height * scale + 0.5), int(width * scale + 0.5)


def make_clip_scorer(clip: Any, *, antialias: bool = False) -> Scorer:
    """The scorer of a CLIP, step-aware or plain: ``exp(logit_scale) * cosine(image, text)``.

    A plain CLIP is given the timesteps too, and does not look at them. ``antialias``: see ``preprocess_images``.
    """

    def encode_text(params: Any, tokens: jax.Array) -> jax.Array:
        return _unit(clip.apply({"params": params}, tokens, method=clip.text_features))

    def score(params: Any, images: jax.Array, text: jax.Array, timesteps: jax.Array) -> jax.Array:
        pixels = preprocess_images(images, clip.image_size, antialias=antialias)
        times = (timesteps,) if clip.step_aware else ()
        image = _unit(clip.apply({"params": params}, pixels, *times, method=clip.image_features))
        chex.assert_equal_shape([image, text])  # one text for all pictures would be broadcast
        return jnp.exp(params["logit_scale"].astype(jnp.float32)) * (image * text).sum(axis=-1)

    return Scorer(encode_text, score, clip.tower)


def make_function_scorer(function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> Scorer:
    """The scorer of a user's function, which has no parameters and reads the prompt's tokens itself.

    Args:
      function: ``(images float32 [n, H, W, 3] in [-1, 1], tokens int32 [n, L], timesteps int32 [n]) -> float32 [n]``.
        The decoder's overshoots are clipped before it sees them.
    """

    def encode_text(_params: Any, tokens: jax.Array) -> jax.Array:
        return jnp.asarray(tokens, jnp.int32)

    def score(_params: Any, images: jax.Array, text: jax.Array, timesteps: jax.Array) -> jax.Array:
        return function(jnp.clip(images.astype(jnp.float32), -1.0, 1.0), text, timesteps.astype(jnp.int32))

    return Scorer(encode_text, score)


def _unit(features: jax.Array) -> jax.Array:
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
