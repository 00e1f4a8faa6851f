"""Files below a folder of a user's own: read with a bound, and never from elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from spo_jax.data.records import MAX_PICTURE_BYTES, Record


class Source(NamedTuple):
    """``read`` streams ``num_records`` records, each time from the start."""

    num_records: int
    read: Callable[[], Iterator[Record]]


def inside(folder: Path, name: str) -> Path | None:
    """The path of a file below the folder, or None if it leads out of it, also by a link."""
    path = None if "\0" in name else Path(os.path.realpath(folder / name))
    return path if path and path.is_relative_to(os.path.realpath(folder)) else None


def read_file(folder: Path, name: str, most: int) -> bytes | None:
    """The first ``most`` bytes of a file below the folder; None if there is no such file, or it cannot be read."""
    path = inside(folder, name) if name else None
    with contextlib.suppress(OSError):
        if path is not None and path.is_file():  # a pipe would wait for ever
            with path.open("rb") as file:
                return file.read(most)
    return None


def read_picture(folder: Path, name: str) -> bytes:
    """An encoded image; empty if there is none. One byte more than is allowed, so that it still counts as too large."""
    return read_file(folder, name, MAX_PICTURE_BYTES + 1) or b""
