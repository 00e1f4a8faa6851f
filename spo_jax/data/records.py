"""A record of a preference data set: what it holds, what is wrong with it, and its images as arrays.

Every fault has a name in ``FAULTS``; it is the name under which the record is counted. Nothing here needs JAX.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator
from typing import Protocol, TypedDict

import numpy as np
from PIL import Image

from spo_jax.data.augmentation import CENTERED, View
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


def is_tied(record: Record) -> bool:
    """Whether nobody is known to prefer either picture: the labels are equal, and nothing is wrong at first sight."""
    return record["label_0"] == record["label_1"] and fault_of(record) is None


def decode_pair(record: Record, size: tuple[int, int], views: tuple[View, View] = (CENTERED, CENTERED)) -> Json:
    """What is trained on: ``caption`` str, ``images`` uint8 [2, H, W, 3], ``crops`` int32 [2, 4] as ``view_picture``
    gives them, ``labels`` float32 [2], ``weight`` float; Fault if the record cannot be used."""
    if fault := fault_of(record):
        raise Fault(fault)
    encoded = record["image_0"], record["image_1"]
    images, crops = zip(
        *(view_picture(data, size, view) for data, view in zip(encoded, views, strict=True)), strict=True
    )
    return {
        "caption": record["caption"].decode("utf-8").strip(),
        "images": np.stack(images),
        "crops": np.stack(crops),
        "labels": np.array([record["label_0"], record["label_1"]], np.float32),
        "weight": 1 / record["num_example_per_prompt"],
    }


def decode_picture(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """An encoded image as uint8 [H, W, 3], cut around its centre; see ``view_picture``."""
    return view_picture(data, size, CENTERED)[0]


def view_picture(data: bytes, size: tuple[int, int], view: View) -> tuple[np.ndarray, np.ndarray]:
    """An encoded image as uint8 [H, W, 3]: RGB, resized to cover ``size`` = (H, W), and cut to it.

    With ``CENTERED`` as in the released code (transformers' CLIP processor on PIL): bicubic with antialias, the longer
    side rounded down, cut around the centre, transparency dropped, orientation tags ignored. 16 bits are scaled to 8.

    Returns:
      The image, and int32 [4] of how it came about: height and width of the encoded image, top and left of the cut in
      the resized one. A mirrored image keeps the ``left`` of the cut before it was mirrored.

    Raises:
      Fault: it is no image of an allowed format, damaged, or too large; the size is read before anything is decoded.
    """
    method = Image.Resampling.BILINEAR if view.resize == "bilinear" else Image.Resampling.BICUBIC
    with _open_picture(data) as picture:
        width, height = picture.size
        # The smallest size of the same aspect that covers the other.
        if size[0] * width >= size[1] * height:
            resized = size[0], max(size[1], size[0] * width // height)
        else:
            resized = max(size[0], size[1] * height // width), size[1]
        # A line of one pixel is small, but not when it has been made as high as the others.
        if math.prod(resized) > MAX_PICTURE_PIXELS:
            raise Fault("picture_too_large")
        try:
            picture.load()  # the steps below would copy even where they change nothing
            rgb = _as_rgb(picture)
            if resized != (height, width):
                rgb = rgb.resize((resized[1], resized[0]), method)
        except Exception as error:
            raise Fault("picture_broken") from error
    spare = resized[0] - size[0], resized[1] - size[1]
    if view.place is None:
        top, left = spare[0] // 2, spare[1] // 2
    else:  # each place as often as another
        top, left = (int(at * (room + 1)) for at, room in zip(view.place, spare, strict=True))
    image = np.asarray(rgb)[top : top + size[0], left : left + size[1]]
    return image[:, ::-1] if view.mirrored else image, np.array([height, width, top, left], np.int32)


def decode_whole(data: bytes) -> np.ndarray:
    """An encoded image at its own size, uint8 [h, w, 3]; RGB and Fault as ``view_picture``."""
    with _open_picture(data) as picture:
        try:
            return np.asarray(_as_rgb(picture))
        except Exception as error:
            raise Fault("picture_broken") from error


@contextlib.contextmanager
def _open_picture(data: bytes) -> Iterator[Image.Image]:
    """An image of which only the header has been read; Fault if that is none, or the image too large."""
    with warnings.catch_warnings():
        # Pillow's own limit of pixels, which is higher, and its remarks about metadata.
        warnings.simplefilter("ignore")
        try:
            picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise Fault("picture_too_large") from error
        except Exception as error:  # Pillow's decoders raise whatever they stumble over
            raise Fault("picture_broken") from error
        if math.prod(picture.size) > MAX_PICTURE_PIXELS:
            raise Fault("picture_too_large")
        yield picture


def _as_rgb(picture: Image.Image) -> Image.Image:
    """Pillow cuts grey of 16 bits off at 255, which is white; its 16-bit colours come scaled already."""
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")
