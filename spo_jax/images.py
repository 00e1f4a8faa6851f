"""Pictures as arrays and as PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from spo_jax.files import atomic_write


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] (clipped) to uint8 in [0, 255]; rounded as diffusers does, halves to even numbers."""
    return np.rint(np.clip(np.asarray(images, np.float32) / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def grid_size(count: int, height: int, width: int, columns: int | None = None, gap: int = 2) -> tuple[int, int]:
    """Height and width of a ``grid``."""
    columns = columns or math.ceil(math.sqrt(count))
    return math.ceil(count / columns) * (height + gap) + gap, columns * (width + gap) + gap


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Arranges uint8 images [n, H, W, 3] in rows on white; about square unless ``columns`` is given."""
    count, height, width, _ = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    sheet = np.full((*grid_size(count, height, width, columns, gap), 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def write_png(path: str | Path, image: np.ndarray, zoom: int = 1) -> None:
    """Writes a uint8 image [H, W, 3], enlarged ``zoom`` times without smoothing."""
    picture = Image.fromarray(image)
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    with atomic_write(path) as temporary:
        picture.save(temporary, "PNG")
