"""Writes preference pairs as a data set of TensorFlow Datasets, in ArrayRecord files, without TensorFlow."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from spo_jax.data.records import Record
from spo_jax.errors import UserError, first_line

NAME = "preference_pairs"
INFO = "dataset_info.json"
_SHARD_BYTES = 256 * 2**20
_LEFT_OVER = re.compile(rf"\.incomplete-|{NAME}-|features\.json")  # of an interrupted preparation
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


def _info(folder: Path) -> tfds.core.DatasetInfo:
    """What tfds keeps of a data set beside its records; images stay encoded as they came."""
    # Plain bytes, not tfds.features.Image, which looks into an image and refuses a broken one.
    encoded = tfds.features.Tensor(shape=(), dtype=np.object_)
    label = tfds.features.Scalar(np.float32)
    features = {
        "caption": tfds.features.Text(),
        "image_0": encoded,
        "image_1": encoded,
        "label_0": label,
        "label_1": label,
        "has_label": tfds.features.Scalar(np.bool_),
        "num_example_per_prompt": tfds.features.Scalar(np.int64),
    }
    identity = DatasetIdentity(
        name=NAME, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    info.set_file_format("array_record")
    return info


def _write_shards(
    template: tfds.core.ShardedFileTemplate, features: tfds.features.FeaturesDict, records: Iterable[Record]
) -> tuple[list[int], int]:
    """The number of records in each shard, and the bytes of all. tfds's own writer needs TensorFlow for large data."""
    serializer = ExampleSerializer(features.get_serialized_info())
    lengths: list[int] = []
    total, in_shard, writer = 0, 0, None
    for record in records:
        if writer is None:
            path = template.sharded_filepath(shard_index=len(lengths), num_shards=None)
            # A group of one: records are read one by one. Compression finds nothing in encoded images.
            writer, in_shard = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed"), 0
            lengths.append(0)
        example = serializer.serialize_example(features.encode_example(record))
        writer.write(example)
        lengths[-1] += 1
        in_shard += len(example)
        total += len(example)
        if in_shard >= _SHARD_BYTES:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()
    return lengths, total


def check_output(out: Path, split: str) -> None:
    """Raises UserError if the split cannot be added to the folder ``out``."""
    if not re.fullmatch(r"[A-Za-z]\w*", split, re.ASCII) or split.lower() == "all":
        raise UserError(f"--split={split} must be a name of letters, digits and underscores, and not 'all'.")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; choose a folder.")
    if (out / INFO).is_file():
        if split in open_builder(out).info.splits:
            raise UserError(f"--out={out} has a split {split!r} already; choose another --out or --split.")
    elif out.is_dir() and not all(_LEFT_OVER.match(path.name) for path in out.iterdir()):
        raise UserError(f"--out={out} has other files in it; choose a new folder.")


def open_builder(folder: Path) -> tfds.core.DatasetBuilder:
    """The tfds builder of a prepared folder; UserError if it is none of ours."""
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # tfds raises whatever its parsers meet
        raise UserError(
            f"Folder {folder} cannot be read as prepared data ({first_line(error)}); prepare it again."
        ) from error
    if builder.name != NAME:
        raise UserError(f"Folder {folder} holds the data set {builder.name!r}, not what spo_jax.prepare writes.")
    return builder


def write_split(out: Path, split: str, records: Iterable[Record]) -> None:
    """Adds a split to the folder ``out``, which may have others.

    The split is there when ``dataset_info.json`` names it; that file is replaced last, and at once.

    Raises:
      UserError: as ``check_output``; or the folder cannot be written to; or there are no records.
    """
    check_output(out, split)
    scratch = out / f".incomplete-{split}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        info = _info(scratch)
        template = tfds.core.ShardedFileTemplate(
            data_dir=scratch, template=_TEMPLATE, dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        lengths, num_bytes = _write_shards(template, info.features, records)
        if not lengths:
            raise UserError("--source has no records.")
        for shard in scratch.glob(f"{NAME}-{split}.*"):
            os.replace(shard, out / shard.name)
        others = open_builder(out).info.splits.values() if (out / INFO).is_file() else ()
        new = tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
        info.set_splits(tfds.core.splits.SplitDict([*others, new]))
        info.write_to_directory(scratch)
        os.replace(scratch / "features.json", out / "features.json")
        os.replace(scratch / INFO, out / INFO)
    except (OSError, RuntimeError) as error:  # array_record raises the latter when the disk is full
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        raise UserError(f"--out={out} cannot be written ({reason}); make space or choose another place.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
