"""What a metric of finished images is: the metrics that papers report, each with its own files, resize and scale.

They see 8-bit images, as a saved file has them, and prepare these on the host as their authors do; ``metrics.py`` has
those that a training run computes within its own programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

# ``(images, uint8 [H, W, 3] each and of any sizes; prompts) -> float32 [n]``, of the i-th image with the i-th prompt.
ScorePictures = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ImageMetric:
    """A score of 8-bit images, higher is better.

    Attributes:
      title: of it in a report, such as "HPSv2.1".
      meaning: a sentence for the report.
      score: see ``ScorePictures``.
      settings: what is stored with each number: files with their SHA-256, resize, scale, dtype.
      form: how a mean is written, such as ".2f".
      reads_prompts: whether the score depends on the prompt.
      compares: whether it can say which of two images of a prompt is better.
    """

    title: str
    meaning: str
    score: ScorePictures
    settings: dict[str, str | int | float]
    form: str = ".3f"
    reads_prompts: bool = True
    compares: bool = True
