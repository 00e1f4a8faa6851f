"""What published scorers do to an 8-bit image before their network sees it, each in its own way.

    pil_crop           Pillow's bicubic to the shorter side, then the centre: CLIP, PickScore, ImageReward, aesthetic
    tensor             PyTorch's bicubic of HPSv2 to the longer side, black padding; no antialiasing (old torchvision)
    tensor_antialias   the same with antialiasing, as torchvision has it from 0.17 on

All of it is computed on the host: Pillow rounds to 8 bits after each of its two passes, which no network library does.
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from spo_jax.preference.scorers import CLIP_MEAN, CLIP_STD

TORCHVISION, TRANSFORMERS = "torchvision", "transformers"  # whose centre crop
RESIZES = ("tensor", "tensor_antialias", "pil_crop")  # of HPSv2


# ---------------------------------------------------------------------------------------------------------- geometry
def shorter_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width when the shorter side becomes ``size``; the longer one is rounded down.

    The order counts: ``size * long / short`` is the exact quotient rounded once, ``long * (size / short)`` may fall
    below a whole number (640 x 720 to 224: 252, not 251).
    """
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def centre(length: int, size: int, rule: str) -> int:
    """Where the middle ``size`` of ``length`` pixels begins; the rules differ where one side is left an odd number.

    ``TORCHVISION`` rounds the half, to even ones; ``TRANSFORMERS`` rounds it down. They are a pixel apart where
    ``length - size`` is 3 more than a multiple of 4, as at 832 x 1216.
    """
    return round((length - size) / 2) if rule == TORCHVISION else (length - size) // 2


def longer_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width when the longer side becomes ``size``, as HPSv2 has it: halves are rounded to even numbers."""
    scale = size / float(max(height, width))
    return round(height * scale), round(width * scale)


def padding(height: int, width: int, size: int) -> tuple[int, int]:
    """Rows above and columns left of an image in the middle of a square; an odd one more is below or right."""
    return (size - height) // 2, (size - width) // 2


# ------------------------------------------------------------------------------------------------------------ images
def pil_crop(image: np.ndarray, size: int, rule: str) -> np.ndarray:
    """Pillow's bicubic to the shorter side, then the centre.

    Args:
      image: uint8 [H, W, 3].
      size: of the square that is left.
      rule: ``TORCHVISION`` or ``TRANSFORMERS``, see ``centre``.

    Returns:
      uint8 [size, size, 3].
    """
    height, width = _checked(image).shape[:2]
    height, width = shorter_side(height, width, size)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = centre(height, size, rule), centre(width, size, rule)
    return np.asarray(resized)[top : top + size, left : left + size]


def hpsv2_tensor(image: np.ndarray, size: int, *, antialias: bool) -> np.ndarray:
    """HPSv2's own resize: bicubic of numbers in [0, 1] to the longer side, not clipped, then black to a square.

    An image whose longer side is ``size`` already is padded like any other. The published program leaves such an image
    as it is, and its network then fails unless it is a square, so there is no number to agree with.

    Args:
      image: uint8 [H, W, 3].
      size: of the square.
      antialias: whether to resize as torchvision does from 0.17 on.

    Returns:
      float32 [size, size, 3], not normalised: the padding is 0, as the published program pads before it normalises.
    """
    height, width, channels = _checked(image).shape
    pixels = image.astype(np.float32) / np.float32(255)
    new_height, new_width = longer_side(height, width, size)
    if (new_height, new_width) != (height, width):
        rows, columns = _bicubic(height, new_height, antialias), _bicubic(width, new_width, antialias)
        narrow = np.tensordot(pixels, columns, axes=(1, 1))  # [H, 3, w]: sums in float64
        pixels = np.tensordot(rows, narrow, axes=(1, 0)).transpose(0, 2, 1).astype(np.float32)
    square = np.zeros((size, size, channels), np.float32)
    top, left = padding(new_height, new_width, size)
    square[top : top + new_height, left : left + new_width] = pixels
    return square


def normalised(pixels: np.ndarray) -> np.ndarray:
    """CLIP's float32 pixels, (x - mean) / std, of uint8 or of numbers in [0, 1], [..., 3]."""
    if pixels.dtype == np.uint8:
        pixels = pixels.astype(np.float32) / np.float32(255)
    return (pixels - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)


def clip_pixels(image: np.ndarray, size: int, rule: str) -> np.ndarray:
    """uint8 [H, W, 3] to float32 [size, size, 3]: ``pil_crop`` and ``normalised``."""
    return normalised(pil_crop(image, size, rule))


def hpsv2_pixels(image: np.ndarray, size: int, resize: str) -> np.ndarray:
    """uint8 [H, W, 3] to HPSv2's float32 [size, size, 3], in one of the three ways of ``RESIZES``."""
    if resize == "pil_crop":
        return clip_pixels(image, size, TORCHVISION)
    return normalised(hpsv2_tensor(image, size, antialias=resize == "tensor_antialias"))


# ------------------------------------------------------------------------------------------------------------ pieces
def _checked(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    return image


@functools.lru_cache(maxsize=64)
def _bicubic(length: int, new: int, antialias: bool) -> np.ndarray:
    """The weights, float64 [new, length], of PyTorch's bicubic resize of one side.

    Without antialiasing the kernel (a = -0.75) always reads four pixels, of which those beyond the edge are the last
    one; with it the kernel (a = -0.5) is as wide as a new pixel, and is cut off at the edge.
    """
    scale = length / new
    weights = np.zeros((new, length))
    if not antialias:
        places = (np.arange(new) + 0.5) * scale - 0.5
        for tap in range(-1, 3):
            pixel = np.floor(places).astype(int) + tap
            np.add.at(weights, (np.arange(new), pixel.clip(0, length - 1)), _kernel(places - pixel, -0.75))
        return weights
    wide = max(scale, 1.0)
    for i in range(new):
        middle = (i + 0.5) * scale
        first, last = max(int(middle - 2 * wide + 0.5), 0), min(int(middle + 2 * wide + 0.5), length)
        row = _kernel((np.arange(first, last) + 0.5 - middle) / wide, -0.5)
        weights[i, first:last] = row / row.sum()
    return weights


def _kernel(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
