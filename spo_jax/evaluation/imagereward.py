"""ImageReward v1.0 (arXiv 2304.05977) as its authors' program gives it, of 8-bit pictures."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError, notice
from spo_jax.evaluation.clip_metrics import in_batches
from spo_jax.evaluation.image_metric import ImageMetric
from spo_jax.evaluation.preprocess import TORCHVISION, clip_pixels
from spo_jax.files import sha256_of
from spo_jax.formats.imagereward import (
    MAX_TOKENS,
    find_files,
    read_imagereward,
    read_wordpiece,
    tokenize_wordpiece,
)
from spo_jax.formats.tokenizers import cut_warning
from spo_jax.models.blip import RELEASED, REWARD_MEAN, REWARD_STD, Sizes


def open_imagereward(
    place: str | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    sizes: Sizes = RELEASED,
    batch_size: int = 16,
) -> ImageMetric:
    """The metric ImageReward.

    Args:
      place: a folder with ``ImageReward.pt``, ``med_config.json`` and ``vocab.txt``, or a repository of the hub with
        the first two; None is the authors' at a commit.
      dtype: of the weights and of what is computed; float32 is computed at full precision on any device.
      sizes: what the files do not say, which is that of the release.
      batch_size: pictures at a time; all batches are of this size, so that one program is compiled.

    Raises:
      UserError: a file is missing, or is not of ImageReward v1.0.
    """
    files = find_files(place)
    network, params = read_imagereward(files, sizes=sizes, dtype=dtype)
    tokenizer = read_wordpiece(files.vocabulary, network.text_encoder.vocab_size)
    if network.text_encoder.max_position_embeddings < MAX_TOKENS:
        raise UserError(
            f"File {files.config}: max_position_embeddings is less than the {MAX_TOKENS} tokens of a prompt."
        )
    exact = jnp.dtype(dtype) == jnp.float32

    @jax.jit
    def rewards(params: PyTree, pixels: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return network.apply({"params": params}, pixels, tokens, mask)

    def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images and {len(prompts)} prompts; each image has its own")
        if not prompts:
            return np.zeros(0, np.float32)
        if warning := cut_warning([tokenizer], prompts):
            notice(warning)
        pixels = (clip_pixels(image, sizes.image_size, TORCHVISION) for image in images)
        with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
            words = tokenize_wordpiece(tokenizer, list(prompts))
            return in_batches(functools.partial(rewards, params), batch_size, pixels, *words).reshape(-1)

    return ImageMetric(
        "ImageReward",
        "How well an image fits its prompt and how good it is, as people chose (ImageReward v1.0): 0 on average.",
        score,
        {
            "model": "ImageReward v1.0",
            **{f"sha256 of {path.name}": sha256_of(path) for path in files},
            "resize": f"Pillow's bicubic, shorter side {sizes.image_size}, centre crop as torchvision's",
            "scale": f"(output - {REWARD_MEAN}) / {REWARD_STD}",
            "max_tokens": MAX_TOKENS,
            "dtype": str(jnp.dtype(dtype)),
        },
    )
