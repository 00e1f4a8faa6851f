"""Prompt files, lines of text, JSON and tables, and the order in which training goes through the prompts."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from spo_jax.data.prompt_sets import PROMPT_SETS
from spo_jax.errors import UserError, first_line
from spo_jax.formats.hub import exists, fetched

TFDS = "tfds:"
FEATURES = ("caption", "prompt", "text")
MAX_BYTES = 64 * 2**20
_WHAT = (
    'one prompt a line (.txt), a JSON list, JSON lines with "caption" (.jsonl), or a table with such a column (.csv)'
)
# What others keep prompts in, and what would be read as lines of text that no prompt has.
_OTHERS = (
    *(".parquet", ".arrow", ".feather", ".xls", ".xlsx", ".ods", ".yaml", ".yml", ".toml", ".xml", ".html", ".pkl"),
    *(".npy", ".npz", ".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".tgz"),
    *(".rtf", ".doc", ".docx", ".odt", ".pdf", ".py", ".ipynb", ".db", ".sqlite"),
)
# JSON begins like this, and no prompt does: an object or a list, then a string or the end of the line.
_JSON = re.compile(r'\s*(\[\s*)?\{\s*("|[\r\n])|\s*\[[^\S\r\n]*("|[\r\n])')
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # behind UTF-32's, which begin with them


def place_of(name: str) -> str:
    """Where the prompts of a name are: a file that exists comes first, then the sets of ``prompt_sets.py``."""
    return name if exists(name) else PROMPT_SETS.get(name, name)


def read_prompts(path: str | Path) -> list[str]:
    """Prompts that are not empty, from a file or a data set.

    A file, local or remote (see ``formats/remote.py``), has one prompt a line, or is a JSON list of strings or of
    objects with a ``"caption"``, or JSON lines of the same (``.jsonl``), or a table with such a column (``.csv``,
    ``.tsv``). ``"prompt"`` and ``"text"`` may stand for ``"caption"``.

    A prompt set of ``prompt_sets.py`` goes by its name, such as "parti".

    A data set, ``tfds:NAME@SPLIT`` or ``tfds:FOLDER@SPLIT``, is one that TensorFlow Datasets has prepared; the split is
    ``train`` if none is named, and the feature one of the same names.

    Raises:
      UserError: the file is missing, unreadable, larger than 64 MiB, of another format, not UTF-8 (or UTF-16 with a
        mark), not valid, or has no prompt in it; the data set is not there, or has no such split or feature.
    """
    path = place_of(str(path))
    return _from_tfds(path) if path.startswith(TFDS) else _from_file(fetched(path))


def _from_tfds(source: str) -> list[str]:
    import tensorflow_datasets as tfds  # takes seconds to import

    name, _, split = os.path.expanduser(source.removeprefix(TFDS)).partition("@")
    try:
        builder = tfds.builder_from_directory(name) if Path(name).is_dir() else tfds.builder(name, try_gcs=False)
        # Random access needs no TensorFlow, but a data set that was written as ArrayRecord.
        data = builder.as_data_source(split=split or "train")
    except Exception as error:  # of its own kinds, and those of whatever it reads
        raise UserError(
            f"Data set {source!r} cannot be read ({first_line(error)}); give tfds:NAME@SPLIT or tfds:FOLDER@SPLIT of "
            'one that is prepared with file_format="array_record".'
        ) from error
    feature = next((f for f in FEATURES if f in builder.info.features), None)
    if feature is None:
        raise UserError(f"Data set {source!r} has none of the features {', '.join(FEATURES)}.")
    texts = (example[feature] for example in data)
    prompts = [text.decode("utf-8").strip() if isinstance(text, bytes) else str(text).strip() for text in texts]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"Data set {source!r} is empty.")
    return prompts


def num_batches(num_prompts: int, batch_size: int) -> int:
    """Batches in an epoch; the last one is filled up with prompts from the start of the epoch's order."""
    return -(-num_prompts // batch_size)


def batch_indices(num_prompts: int, batch_size: int, seed: int, batch: int) -> np.ndarray:
    """Prompt indices [batch_size] of the ``batch``-th batch since the start of training.

    Depends on its arguments alone, so that a resumed run continues in the same order. Each epoch has its own
    permutation; its last batch wraps around to keep shapes static.
    """
    epoch, position = divmod(batch, num_batches(num_prompts, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(num_prompts)
    return order[np.arange(position * batch_size, (position + 1) * batch_size) % num_prompts]


# -------------------------------------------------------------------------------------------------------------- files
def json_lines(lines: Iterable[str], what: str) -> Iterator[tuple[int, object]]:
    """The values of JSON lines and their line numbers; UserError, which names ``what``, for a line that is none."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{what}, line {number}: not valid JSON ({error}); mend it.") from error


def _from_file(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"Prompt file {path} does not exist; give a text file with one prompt a line, or a JSON list.")
    suffix = path.suffix.lower()
    if suffix in _OTHERS:
        raise UserError(f"Prompt file {path} is a {suffix} file, which is not read; write its prompts as {_WHAT}.")
    text = _text(path)
    # A prompt may begin with a brace, but is no object, or with a bracket, but is no list of prompts.
    first = next((line for line in _lines(text) if line.strip()), "")
    has_objects = isinstance(_parsed(first), dict) and (suffix != ".json" or _parsed(text) is None)
    whole = _parsed(text) if text.lstrip().startswith("[") else None
    is_list = isinstance(whole, list) and all(isinstance(entry, str | dict) for entry in whole)
    what = f"Prompt file {path}"
    if suffix in (".csv", ".tsv"):
        prompts = _from_table(what, text, "\t" if suffix == ".tsv" else ",")
    elif suffix in (".jsonl", ".ndjson") or has_objects:
        entries = json_lines(_lines(text), what)
        prompts = [_caption(what, f"line {number}", entry) for number, entry in entries]
    elif suffix == ".json" or is_list or _JSON.match(text):
        prompts = _from_json(what, text)
    else:
        _refuse_table(path, [line for line in _lines(text) if line.strip()])
        prompts = [line.strip() for line in _lines(text)]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"Prompt file {path} is empty; write one prompt a line, or a JSON list of them.")
    return prompts


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"Prompt file {path} is larger than {MAX_BYTES} bytes; split it.")
    try:
        content = path.read_bytes()
        text = content.decode(next((kind for mark, kind in _MARKS.items() if content.startswith(mark)), "utf-8"))
    except OSError as error:
        raise UserError(f"Prompt file {path} cannot be read ({error.strerror}); check its permissions.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"Prompt file {path} is not {error.encoding.upper()} (byte {error.start} is "
            f"{error.object[error.start]:#04x}); save it with UTF-8 encoding."
        ) from error
    if (place := text.find("\0")) >= 0:
        raise UserError(
            f"Prompt file {path} is no text, or has another encoding (character {place} is NUL); "
            "save it with UTF-8 encoding."
        )
    return text


def _lines(text: str) -> list[str]:
    # Not splitlines(): it also ends a line at characters such as U+2028, which may stand inside a caption.
    return text.replace("\r", "\n").split("\n")


# --------------------------------------------------------------------------------------------------------------- JSON
def _parsed(text: str) -> object:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # beyond JSONDecodeError: a number of 5,000 digits, endless brackets
        return None


def _from_json(what: str, text: str) -> list[str]:
    if not text.strip():
        return []
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{what} is not valid JSON ({error}); mend it, or give a text file with one prompt a line."
        ) from error
    if not isinstance(entries, list):
        raise UserError(f"{what} must hold a JSON list, not a {type(entries).__name__}.")
    return [_caption(what, f"entry {i}", entry) for i, entry in enumerate(entries)]


def _caption(what: str, where: str, entry: object) -> str:
    caption = entry.get(_feature(entry)) if isinstance(entry, dict) else entry
    if not isinstance(caption, str):
        found = f"; it has {_listed(entry)}" if isinstance(entry, dict) else ""
        raise UserError(f'{what}: {where} is neither a string nor an object with a "caption" string{found}.')
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise UserError(f"{what}: {where} is not valid Unicode (half a surrogate pair); mend it.")
    return caption.strip()


# -------------------------------------------------------------------------------------------------------------- tables
def _refuse_table(path: Path, lines: list[str]) -> None:
    """Refuses lines of text that are those of a table: the first one names a caption, and all have a delimiter."""
    for sign, suffix in {"\t": ".tsv", ",": ".csv", ";": ".csv"}.items():
        if len(lines) > 1 and all(sign in line for line in lines) and _feature(lines[0].split(sign)) is not None:
            raise UserError(
                f"Prompt file {path} looks like a table: its first line, {lines[0][:80]!r}, names columns; "
                f"name the file {path.stem}{suffix}."
            )


def _from_table(what: str, text: str, delimiter: str) -> list[str]:
    """The column of a table; one with semicolons, as spreadsheets write it in half of Europe, is told by its header."""
    text = text.lstrip("\r\n")
    try:
        headers = {sign: next(csv.reader([_lines(text)[0]], delimiter=sign), []) for sign in ",;\t"}
        sign = next((sign for sign in (delimiter, *headers) if _feature(headers[sign])), delimiter)
        column = _feature(headers[sign])
        if not text:
            return []
        if column is None:
            raise UserError(
                f"{what} has no column {', '.join(FEATURES[:-1])} or {FEATURES[-1]}, only "
                f"{_listed(headers[sign])}; name the one with the prompts in the first line."
            )
        if sum(_plain(name) == _plain(column) for name in headers[sign]) > 1:
            raise UserError(f"{what} has several columns {column!r}; leave one.")
        rows = io.StringIO(text, newline="")
        try:
            return list(_column(what, csv.DictReader(rows, delimiter=sign, strict=True), column))
        except csv.Error:
            if sign != "\t":
                raise
            # Tabs are often written without quoting: a quote is one then.
            rows.seek(0)
            return list(_column(what, csv.DictReader(rows, delimiter=sign, quoting=csv.QUOTE_NONE), column))
    except csv.Error as error:
        raise UserError(f"{what} is not a valid table ({error}); mend it.") from error


def _column(what: str, reader: csv.DictReader, column: str) -> Iterator[str]:
    for row in reader:
        if row[column] is None or None in row:
            raise UserError(
                f"{what}, line {reader.line_num}: there are {'more' if None in row else 'fewer'} cells "
                "than columns; mend it, a prompt with the delimiter in it stands in quotes."
            )
        yield row[column].strip()


def _feature(names: Iterable[str]) -> str | None:
    """The first of the names that is a caption's, in whatever case, and also in the plural."""
    plain = {_plain(name): name for name in reversed(list(names))}
    return next((plain[feature] for feature in FEATURES if feature in plain), None)


def _plain(name: str) -> str:
    return str(name).strip().lower().removesuffix("s")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(str(name)[:40]) for name in list(names)[:8]) or "nothing"
