"""A record of a preference data set: what it holds, what is wrong with it, and its images as arrays.

Every fault has a name in ``FAULTS``; it is the name under which the record is counted. Nothing here needs JAX.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Protocol, TypedDict

import numpy as np
from PIL import Image

from spo_jax.formats.json_files import Json

MAX_CAPTION_BYTES = 100_000
MAX_PICTURE_BYTES = 32 * 2**20  # encoded
MAX_PICTURE_PIXELS = 2**25
FORMATS = ("JPEG", "PNG", "WEBP")
FAULTS = {
    "record_broken": "the prepared file is damaged at this place",
    "caption_missing": "the caption is empty",
    "caption_broken": f"the caption is not UTF-8, or longer than {MAX_CAPTION_BYTES} bytes",
    "label_out_of_range": "a label is missing or outside [0, 1]",
    "labels_do_not_add_up": "the two labels do not add up to 1",
    "count_invalid": "num_example_per_prompt is missing or less than 1",
    "picture_missing": "a picture is empty, or its file was not there",
    "picture_too_large": f"a picture has more than {MAX_PICTURE_BYTES} bytes or {MAX_PICTURE_PIXELS} pixels",
    "picture_broken": f"a picture is none of {', '.join(FORMATS)}, is damaged or ends too early",
}


class Record(TypedDict):
    """A pair of encoded images of one caption; a label is the preference for its image, NaN if it is missing."""

    caption: bytes
    image_0: bytes
    image_1: bytes
    label_0: float
    label_1: float
    has_label: bool
    num_example_per_prompt: int


class Records(Protocol):
    """The records of a split, each decoded when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Record: ...


class Fault(Exception):
    """What is wrong with a record: a name out of ``FAULTS``."""


def fault_of(record: Record) -> str | None:
    """The first fault of a record that shows without decoding its pictures, or None."""
    caption, labels = record["caption"], (record["label_0"], record["label_1"])
    if len(caption) > MAX_CAPTION_BYTES:
        return "caption_broken"
    try:
        if not caption.decode("utf-8").strip():
            return "caption_missing"
    except UnicodeDecodeError:
        return "caption_broken"
    if not all(0 <= label <= 1 for label in labels):  # so NaN fails, too
        return "label_out_of_range"
    if abs(sum(labels) - 1) > 1e-3:
        return "labels_do_not_add_up"
    if record["num_example_per_prompt"] < 1:
        return "count_invalid"
    for picture in (record["image_0"], record["image_1"]):
        if not picture:
            return "picture_missing"
        if len(picture) > MAX_PICTURE_BYTES:
            return "picture_too_large"
    return None


def decode_pair(record: Record, size: tuple[int, int]) -> Json:
    """What is trained on: ``caption`` str, ``images`` uint8 [2, H, W, 3], ``labels`` float32 [2], ``weight`` float.

    Raises:
      Fault: the record cannot be used.
    """
    if fault := fault_of(record):
        raise Fault(fault)
    images = np.empty((2, *size, 3), np.uint8)
    for image, encoded in zip(images, (record["image_0"], record["image_1"]), strict=True):
        image[:] = decode_picture(encoded, size)
    return {
        "caption": record["caption"].decode("utf-8").strip(),
        "images": images,
        "labels": np.array([record["label_0"], record["label_1"]], np.float32),
        "weight": 1 / record["num_example_per_prompt"],
    }


def decode_picture(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """An encoded image as uint8 [H, W, 3]: RGB, resized to cover ``size`` = (H, W), cut to it around its centre.

    As in the released code (transformers' CLIP processor on PIL): bicubic with antialias, the longer side rounded down,
    transparency dropped, orientation tags ignored. 16 bits are scaled to 8.

    Raises:
      Fault: no image of an allowed format, damaged, or too large; the size is read before anything is decoded.
    """
    with warnings.catch_warnings():
        # Pillow's own limit of pixels, which is higher, and its remarks about metadata.
        warnings.simplefilter("ignore")
        try:
            picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise Fault("picture_too_large") from error
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise Fault("picture_broken") from error
        width, height = picture.size
        resized = _covering(height, width, size)
        # A line of one pixel is small, but not when it has been made as high as the others.
        if max(width * height, math.prod(resized)) > MAX_PICTURE_PIXELS:
            raise Fault("picture_too_large")
        try:
            picture.load()  # the steps below would copy even where they change nothing
            picture = _as_rgb(picture)
            if resized != (height, width):
                picture = picture.resize((resized[1], resized[0]), Image.Resampling.BICUBIC)
        except Exception as error:
            raise Fault("picture_broken") from error
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return np.asarray(picture)[top : top + size[0], left : left + size[1]]


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Pillow cuts grey of 16 bits off at 255, which is white; its 16-bit colours come scaled already."""
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of the same aspect that covers ``size``."""
    if size[0] * width >= size[1] * height:
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]
