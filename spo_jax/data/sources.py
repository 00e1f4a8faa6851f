"""Reads the preference pairs of others: Pick-a-Pic's parquet files, a CSV or JSONL file, or two folders of pictures.

Records are streamed. A missing field becomes an empty value, which later counts as a fault of its record; a file that
is useless as a whole is refused.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import glob
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spo_jax.data.own_files import Source, inside, read_picture
from spo_jax.data.pair_folders import is_pair_folder, open_pair_folder
from spo_jax.data.prompts import json_lines
from spo_jax.data.records import MAX_PICTURE_BYTES, Record
from spo_jax.errors import UserError
from spo_jax.formats.json_files import Json

COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "num_example_per_prompt")
KEYS = ("caption", "image_a", "image_b", "label")
_MAX_LINE = 2**20
_TEXT, _BYTES = (pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())
_ROWS = 32  # of a parquet file that are in memory at a time


def open_source(source: str) -> Source:
    """The records of parquet files (a glob pattern), of a CSV or JSONL file or the folder that has one, or of a folder
    as ``pair_folders.py`` has it. UserError if there is nothing, or a file cannot be read, lacks a column, or names
    images outside of its folder."""
    source = os.path.expanduser(source)
    if Path(source).is_dir():
        paths = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in (".csv", ".jsonl"))
        if not paths and is_pair_folder(Path(source)):
            return open_pair_folder(Path(source))
        if len(paths) != 1:
            raise UserError(
                f"Folder {source} has {len(paths)} CSV or JSONL files; give it one, or the folders chosen/ and "
                "rejected/ with pictures, or name parquet files as in --source='folder/train-*.parquet'."
            )
    else:
        paths = [Path(path) for path in sorted(glob.glob(source, recursive=True))] or [Path(source)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"No file {path} is there; give parquet files, a CSV or JSONL file, or its folder.")
    kinds = {path.suffix.lower() for path in paths}
    if kinds == {".parquet"}:
        num_records = sum([_check_parquet(path) for path in paths])
        return Source(num_records, lambda: (record for path in paths for record in _read_parquet(path)))
    if len(paths) == 1 and kinds <= {".csv", ".jsonl"}:
        return _open_table(paths[0])
    raise UserError(f"--source={source} must name parquet files, one CSV or JSONL file, or the folder of one.")


# ----------------------------------------------------------------------------------------------------------- parquet
@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # A buffer: without it, a row group's whole column is read at once.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"File {path} cannot be read as parquet ({reason}); download it again.") from error


def _check_parquet(path: Path) -> int:
    with _parquet_file(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    for name in COLUMNS:
        if name not in schema.names:
            raise UserError(f"File {path} has no column {name!r}; Pick-a-Pic's are {', '.join(COLUMNS)}.")
        kind = schema.field(name).type
        if name == "caption":
            wanted, fits = "text", (kind.value_type if pa.types.is_dictionary(kind) else kind) in (*_TEXT, *_BYTES)
        elif name in ("jpg_0", "jpg_1"):
            is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            wanted, fits = 'bytes or a struct with "bytes"', (kind.field("bytes").type if is_struct else kind) in _BYTES
        else:
            wanted, fits = "a number", _is_number(kind)
        if not fits:
            raise UserError(f"File {path}: column {name!r} is {kind}; it must be {wanted}.")
    return count


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _read_parquet(path: Path) -> Iterator[Record]:
    with _parquet_file(path) as file:
        for batch in file.iter_batches(_ROWS, columns=list(COLUMNS), use_threads=False):
            columns = [_values(batch.column(name)) for name in COLUMNS]
            for caption, image_0, image_1, label_0, label_1, has_label, count in zip(*columns, strict=True):
                yield {
                    "caption": caption or b"",
                    # One byte more than is allowed, so that it still counts as too large.
                    "image_0": (image_0 or b"")[: MAX_PICTURE_BYTES + 1],
                    "image_1": (image_1 or b"")[: MAX_PICTURE_BYTES + 1],
                    "label_0": math.nan if label_0 is None else label_0,
                    "label_1": math.nan if label_1 is None else label_1,
                    "has_label": has_label == 1,
                    "num_example_per_prompt": int(count) if count is not None and 0 <= count < 2**31 else 0,
                }


def _values(column: pa.Array) -> list:
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    # Text as bytes: pyarrow does not check it, and one caption that is not UTF-8 must not end everything.
    column = column.cast(pa.float64(), safe=False) if _is_number(column.type) else column.cast(pa.large_binary())
    return column.to_pylist()


# --------------------------------------------------------------------------------------------------- CSV and JSONL
def _open_table(path: Path) -> Source:
    captions: collections.Counter[str] = collections.Counter()
    keys: set[str] = set()
    for number, row in enumerate(_rows(path), start=1):
        keys.update(row)
        captions[_text(row.get("caption"))] += 1
        for key in ("image_a", "image_b"):
            if (name := _text(row.get(key))) and inside(path.parent, name) is None:
                raise UserError(
                    f"File {path}, record {number}: {key} is {name!r}, which lies outside of {path.parent}; "
                    "put the pictures below the file and name them relative to it."
                )
    if not captions:
        raise UserError(f"File {path} has no records; every record has {', '.join(KEYS)}.")
    for key in KEYS:
        if key not in keys:
            raise UserError(f"File {path} has no {key!r}; every record has {', '.join(KEYS)}.")

    def read() -> Iterator[Record]:
        for row in _rows(path):
            label, caption = _number(row.get("label")), _text(row.get("caption"))
            yield {
                "caption": caption.encode("utf-8", "surrogatepass"),
                "image_0": read_picture(path.parent, _text(row.get("image_a"))),
                "image_1": read_picture(path.parent, _text(row.get("image_b"))),
                "label_0": label,
                "label_1": 1 - label,
                "has_label": True,
                "num_example_per_prompt": captions[caption],
            }

    return Source(captions.total(), read)


def _rows(path: Path) -> Iterator[Json]:
    lines = _lines(path)
    if path.suffix.lower() == ".csv":
        header = next(lines, "")
        # Spreadsheets in many European languages write semicolons.
        sign = ";" if ";" in header and "," not in header else ","
        reader = csv.DictReader(itertools.chain([header], lines), strict=True, delimiter=sign)
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(f"File {path}, line {reader.reader.line_num}: not valid CSV ({error}); mend it.") from error
        return
    for number, row in json_lines(lines, f"File {path}"):
        if not isinstance(row, dict):
            raise UserError(f"File {path}, line {number}: not an object with {', '.join(KEYS)}; mend it.")
        yield row


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number in range(1, 2**63):
                line = file.readline(_MAX_LINE + 1)
                if len(line) > _MAX_LINE:
                    raise UserError(f"File {path}, line {number} is longer than {_MAX_LINE} characters; mend it.")
                if not line:
                    return
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"File {path} is not UTF-8 ({error.reason}); save it with UTF-8 encoding.") from error
    except OSError as error:
        raise UserError(f"File {path} cannot be read ({error.strerror}); check its permissions.") from error


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _number(value: object) -> float:
    try:
        # A table may hold anything, so the type is not known here; what float() does not take is caught below.
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan
