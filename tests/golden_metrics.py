"""What the authors' programs give for the published metrics (float32, tiny models): ``tests/golden/metrics/``."""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "golden" / "metrics"
NAMES = ("square", "same", "half_even", "odd_pad", "wide", "tall", "small", "crop_odd", "crop_odd_ir", "big", "formula")
CAPTIONS = json.loads((FOLDER / "captions.json").read_text(encoding="utf-8"))


def load() -> dict[str, np.ndarray]:
    """All recorded arrays by name; pictures and pixels are channels-last, scores [picture, caption]."""
    with np.load(FOLDER / "golden.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    y, x, channel = np.ogrid[:512, :512, :3]
    return arrays | {"pic_formula": ((7 * x + 13 * y + 50 * channel + (x * y) // 5) % 256).astype(np.uint8)}


def pictures(golden: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The 11 pictures, uint8 [h, w, 3], of several sizes."""
    return [golden[f"pic_{name}"] for name in NAMES]


def all_pairs(golden: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """Each picture with each caption, captions fastest, so that scores are those of the matrices in one row."""
    images = pictures(golden)
    return [image for image in images for _ in CAPTIONS], CAPTIONS * len(images)
