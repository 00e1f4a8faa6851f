"""Small preference data: pictures, records, and ten and more ways to damage one."""

import io
import math
import struct
import zlib

import numpy as np
import pyarrow as pa
from PIL import Image


def encode(picture, kind="JPEG", **options):
    """A PIL picture as a file in memory."""
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


def picture(seed=0, height=24, width=24, kind="JPEG"):
    """Noise on a gradient, encoded."""
    noise = np.random.default_rng(seed).integers(0, 100, (height, width, 3))
    ramp = np.linspace(0, 155, width, dtype=int)[None, :, None]
    return encode(Image.fromarray((noise + ramp).astype(np.uint8)), kind)


def png_header(width, height):
    """A PNG that claims a size, without pixels to it: 70 bytes."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def record(number=0, **changes):
    """A good record with a caption of its own."""
    return {
        "caption": b"caption %d" % number,
        "image_0": picture(2 * number),
        "image_1": picture(2 * number + 1),
        "label_0": (1.0, 0.0, 0.5)[number % 3],
        "label_1": (0.0, 1.0, 0.5)[number % 3],
        "has_label": True,
        "num_example_per_prompt": 1 + number % 4,
    } | changes


def gif():
    """A picture that every browser shows, of a format that is not allowed."""
    return encode(Image.new("P", (24, 24)), "GIF")


# What is changed in a record, and the name that it is counted under.
DAMAGE = {
    "truncated": (lambda r: {"image_0": r["image_0"][: len(r["image_0"]) // 2]}, "picture_broken"),
    "no picture": (lambda r: {"image_1": b"not a picture"}, "picture_broken"),
    "another format": (lambda r: {"image_1": gif()}, "picture_broken"),
    "empty": (lambda r: {"image_0": b""}, "picture_missing"),
    "bomb": (lambda r: {"image_0": png_header(60_000, 60_000)}, "picture_too_large"),
    "heavy": (lambda r: {"image_1": r["image_1"] + bytes(32 * 2**20)}, "picture_too_large"),
    "beyond 1": (lambda r: {"label_0": 1.5, "label_1": -0.5}, "label_out_of_range"),
    "no label": (lambda r: {"label_1": math.nan}, "label_out_of_range"),
    "two winners": (lambda r: {"label_0": 1.0, "label_1": 1.0}, "labels_do_not_add_up"),
    "blank": (lambda r: {"caption": b" \n"}, "caption_missing"),
    "latin-1": (lambda r: {"caption": b"caf\xe9"}, "caption_broken"),
    "endless": (lambda r: {"caption": b"a" * 100_001}, "caption_broken"),
    "no count": (lambda r: {"num_example_per_prompt": 0}, "count_invalid"),
}


def damage(good, how):
    """A damaged copy of a record."""
    return good | DAMAGE[how][0](good)


def parquet_table(records, as_struct=False):
    """Pick-a-Pic's columns and some of those that are not read; pictures as bytes, or as datasets' Image."""
    picture_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if as_struct else pa.binary()

    def pictures(key):
        data = [r[key] or None for r in records]
        return pa.array([{"bytes": d, "path": "a.jpg"} for d in data] if as_struct else data, picture_type)

    captions = pa.array([r["caption"] for r in records], pa.binary())
    return pa.table(
        {
            "are_different": [True] * len(records),
            "caption": captions.view(pa.string()),  # unchecked, so that captions that are no UTF-8 get in
            "created_at": pa.array([0] * len(records), pa.timestamp("ns")),
            "has_label": [r["has_label"] for r in records],
            "jpg_0": pictures("image_0"),
            "jpg_1": pictures("image_1"),
            "label_0": [r["label_0"] for r in records],
            "label_1": [r["label_1"] for r in records],
            "num_example_per_prompt": [r["num_example_per_prompt"] for r in records],
            "__index_level_0__": list(range(len(records))),
        }
    )
