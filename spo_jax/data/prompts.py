"""Prompt files, and the order in which training goes through them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from spo_jax.checkpoints.hub import fetched
from spo_jax.errors import UserError

MAX_BYTES = 64 * 2**20
TFDS = "tfds:"
_FEATURES = ("caption", "prompt", "text")


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a JSON list (of strings or of ``{"caption": ...}``) or from the non-empty lines of a text file.

    The file is local, or one of the hub or of GitHub, see ``checkpoints/remote.py``. In a JSON list ``"prompt"`` and
    ``"text"`` may stand for ``"caption"``.

    Or, as ``tfds:NAME@SPLIT``, from a data set that TensorFlow Datasets has prepared, by its name or its folder; its
    feature ``caption``, ``prompt`` or ``text`` is taken, its split ``train`` if none is named.

    Raises:
      UserError: the file is missing, unreadable, larger than 64 MiB, not UTF-8, not valid JSON, or has no prompt in it;
        the data set is not there, or has no such split or feature.
    """
    if str(path).startswith(TFDS):
        return _from_tfds(str(path))
    path = fetched(path)
    if not path.is_file():
        raise UserError(f"Prompt file {path} does not exist; give a text file with one prompt a line, or a JSON list.")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"Prompt file {path} is larger than {MAX_BYTES} bytes; split it.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"Prompt file {path} cannot be read ({error.strerror}); check its permissions.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"Prompt file {path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it with UTF-8 encoding."
        ) from error
    # Not splitlines(): it also ends a line at characters such as U+2028, which may stand inside a caption.
    is_json = path.suffix.lower() == ".json"
    prompts = _from_json(path, text) if is_json else [line.strip() for line in text.replace("\r", "\n").split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"Prompt file {path} is empty; write one prompt a line, or a JSON list of them.")
    return prompts


def _from_json(path: Path, text: str) -> list[str]:
    if not text.strip():
        return []
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:  # beyond JSONDecodeError: a number of 5,000 digits, endless brackets
        raise UserError(
            f"Prompt file {path} is not valid JSON ({error}); mend it, or give a text file with one prompt a line."
        ) from error
    if not isinstance(entries, list):
        raise UserError(f"Prompt file {path} must hold a JSON list, not a {type(entries).__name__}.")
    return [_caption(path, i, entry) for i, entry in enumerate(entries)]


def _from_tfds(source: str) -> list[str]:
    import tensorflow_datasets as tfds  # takes seconds to import

    name, _, split = source.removeprefix(TFDS).partition("@")
    try:
        builder = tfds.builder_from_directory(name) if Path(name).is_dir() else tfds.builder(name, try_gcs=False)
        # Random access needs no TensorFlow, but a data set that was written as ArrayRecord.
        data = builder.as_data_source(split=split or "train")
    except Exception as error:  # of its own kinds, and those of whatever it reads
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Data set {source!r} cannot be read ({reason}); give tfds:NAME@SPLIT or tfds:FOLDER@SPLIT of one that "
            'is prepared with file_format="array_record".'
        ) from error
    feature = next((f for f in _FEATURES if f in builder.info.features), None)
    if feature is None:
        raise UserError(f"Data set {source!r} has none of the features {', '.join(_FEATURES)}.")
    texts = (example[feature] for example in data)
    prompts = [text.decode("utf-8").strip() if isinstance(text, bytes) else str(text).strip() for text in texts]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"Data set {source!r} is empty.")
    return prompts


def _caption(path: Path, index: int, entry: Any) -> str:
    caption = next((entry[key] for key in _FEATURES if key in entry), None) if isinstance(entry, dict) else entry
    if not isinstance(caption, str):
        raise UserError(f'Prompt file {path}: entry {index} is neither a string nor an object with a "caption" string.')
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise UserError(f"Prompt file {path}: entry {index} is not valid Unicode (half a surrogate pair); mend it.")
    return caption.strip()


def num_batches(num_prompts: int, batch_size: int) -> int:
    """Batches in an epoch; the last one is filled up with prompts from the start of the epoch's order."""
    return -(-num_prompts // batch_size)


def batch_indices(num_prompts: int, batch_size: int, seed: int, batch: int) -> np.ndarray:
    """Prompt indices [batch_size] of the ``batch``-th batch since the start of training.

    A function of its arguments alone, so that a run that was killed goes on in the same order. Each epoch has its own
    permutation; its last batch wraps around to keep shapes static.
    """
    epoch, position = divmod(batch, num_batches(num_prompts, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(num_prompts)
    return order[np.arange(position * batch_size, (position + 1) * batch_size) % num_prompts]
