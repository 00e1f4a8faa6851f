"""Prompt files, and the order in which training goes through them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from spo_jax.data.prompt_files import FEATURES, read_file
from spo_jax.errors import UserError, first_line
from spo_jax.formats.hub import fetched

TFDS = "tfds:"


def read_prompts(path: str | Path) -> list[str]:
    """Prompts that are not empty, from a file or a data set.

    A file, local or remote (see ``formats/remote.py``), has one prompt a line, or is a JSON list of strings or of
    objects with a ``"caption"``, or JSON lines of the same (``.jsonl``), or a table with such a column (``.csv``,
    ``.tsv``). ``"prompt"`` and ``"text"`` may stand for ``"caption"``.

    A data set, ``tfds:NAME@SPLIT`` or ``tfds:FOLDER@SPLIT``, is one that TensorFlow Datasets has prepared; the split is
    ``train`` if none is named, and the feature one of the same names.

    Raises:
      UserError: the file is missing, unreadable, larger than 64 MiB, of another format, not UTF-8 (or UTF-16 with a
        mark), not valid, or has no prompt in it; the data set is not there, or has no such split or feature.
    """
    return _from_tfds(str(path)) if str(path).startswith(TFDS) else read_file(fetched(path))


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
