"""New labels for given pairs by a metric of finished images: Diffusion-DPO's AI feedback.

The images are scored once, at their own size and as 8 bits, before anything is trained. So training has no second
network in its memory, and every method that reads pairs learns from the same labels.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator

import numpy as np

from spo_jax.data.records import Fault, Record, decode_whole, fault_of
from spo_jax.errors import UserError
from spo_jax.evaluation.image_metric import ImageMetric
from spo_jax.evaluation.image_metrics import IMAGE_METRICS, MetricOptions, open_metric

_CHUNK_RECORDS = 32
_CHUNK_BYTES = 256 * 2**20  # of decoded images that are in memory at a time, and one pair more
_PLACES = {"scorer": "scorer=runs/spm/best", "function": "function=my_module:score"}


def open_labeller(text: str) -> ImageMetric:
    """The metric of ``--relabel=NAME`` or ``NAME=PLACE``; UserError if there is none, or its files are not here."""
    name, sign, place = text.strip().partition("=")
    if name not in IMAGE_METRICS:
        raise UserError(f"--relabel: {name!r} is no metric; there are {', '.join(IMAGE_METRICS)}.")
    if not place and (sign or name in _PLACES):
        raise UserError(f"--relabel={text} lacks a place; write --relabel={_PLACES.get(name, f'{name}=FOLDER')}.")
    metric = open_metric(name, place or None, MetricOptions())
    if not metric.compares:
        raise UserError(f"--relabel={name} cannot say which of two images is better; choose another metric.")
    return metric


def relabelled(records: Iterable[Record], labeller: ImageMetric, counts: collections.Counter[str]) -> Iterator[Record]:
    """The records with label 1 for the image of the higher score and 0 for the other, 0.5 for both if scores are equal.

    ``has_label`` becomes true. A record with a fault other than of its labels keeps what it has.

    Args:
      records: in the order in which they come back.
      labeller: scores the images for the record's caption.
      counts: gets how many were ``relabelled``, and how many ``kept`` their labels.

    Raises:
      UserError: a score is not finite.
    """
    records, number = iter(records), 0
    while True:
        chunk: list[tuple[Record, list[np.ndarray]]] = []
        size = 0
        while len(chunk) < _CHUNK_RECORDS and size < _CHUNK_BYTES and (record := next(records, None)) is not None:
            images = _images_of(record)
            chunk.append((record, images))
            size += sum(image.nbytes for image in images)
        if not chunk:
            return
        pictures = [image for _, images in chunk for image in images]
        captions = [record["caption"].decode("utf-8").strip() for record, images in chunk for _ in images]
        scores = iter(labeller.score(pictures, captions) if pictures else ())
        for record, images in chunk:
            number += 1
            counts["relabelled" if images else "kept"] += 1
            yield _with_label(record, number, *(float(next(scores)) for _ in images)) if images else record


def _images_of(record: Record) -> list[np.ndarray]:
    """Both images, uint8 [h, w, 3] each; none of a record that has a fault."""
    labels: Record = {**record, "label_0": 1.0, "label_1": 0.0}  # whatever it has is replaced
    if fault_of(labels) is not None:
        return []
    try:
        return [decode_whole(record["image_0"]), decode_whole(record["image_1"])]
    except Fault:
        return []


def _with_label(record: Record, number: int, first: float, second: float) -> Record:
    if not (math.isfinite(first) and math.isfinite(second)):
        raise UserError(
            f"--relabel gives the scores {first} and {second} to record {number} of the source; check the metric."
        )
    label = 0.5 if first == second else float(first > second)
    return {**record, "label_0": label, "label_1": 1 - label, "has_label": True}
