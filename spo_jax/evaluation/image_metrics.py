"""The metrics of finished images by name. To add one: write a function that opens it and give it a name here."""

from __future__ import annotations

import functools
from collections.abc import Callable

from spo_jax.evaluation.clip_metrics import (
    MetricOptions,
    open_aesthetic,
    open_clip_score,
    open_hpsv2,
    open_pickscore,
)
from spo_jax.evaluation.image_metric import ImageMetric

# ``(place, options) -> metric``: a folder, a file or a name on the hub, None for the published one at its commit.
# UserError if it is not there, or is another model.
OpenMetric = Callable[[str | None, MetricOptions], ImageMetric]

IMAGE_METRICS: dict[str, OpenMetric] = {
    "pickscore": open_pickscore,
    "hpsv2": functools.partial(open_hpsv2, "hpsv2"),
    "hpsv2.1": functools.partial(open_hpsv2, "hpsv2.1"),
    "aesthetic": open_aesthetic,
    "clip": functools.partial(open_clip_score, "clip"),
    "clip_h": functools.partial(open_clip_score, "clip_h"),
}
