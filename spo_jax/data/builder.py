"""Writes preference pairs as a data set of TensorFlow Datasets, in ArrayRecord files, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from spo_jax.data.records import Record
from spo_jax.errors import UserError, first_line

NAME = "preference_pairs"
INFO = "dataset_info.json"
_SHARD_BYTES = 256 * 2**20
_LEFT_OVER = re.compile(rf"\.incomplete-|{NAME}-|features\.json")  # of an interrupted preparation
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"


# mypy does not follow tfds, and so does not know that its classes take a keyword.
class PreferencePairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """One split of preference pairs, in the order of ``records``; pictures stay encoded as they came."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, split: str, records: Iterable[Record], data_dir: Path):
        self._split, self._records = split, records
        super().__init__(file_format="array_record", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        # Plain bytes, not tfds.features.Image, which looks into a picture and refuses a broken one.
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
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: object) -> dict[str, Iterable[tuple[int, Record]]]:
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Record]]:
        yield from enumerate(self._records)

    def _download_and_prepare(self, dl_manager: object, download_config: object = None) -> None:
        # The inherited one collects a gigabyte in memory, and what is beyond goes through TensorFlow. Shuffling on disk
        # is not needed, because ArrayRecord is read in any order.
        serializer = tfds.core.example_serializer.ExampleSerializer(self.info.features.get_serialized_info())
        infos = []
        for split, examples in self._split_generators(dl_manager).items():
            template = tfds.core.ShardedFileTemplate(
                data_dir=self.data_path,
                template=_TEMPLATE,
                dataset_name=self.name,
                split=split,
                filetype_suffix="array_record",
            )
            serialized = (
                serializer.serialize_example(self.info.features.encode_example(example)) for _, example in examples
            )
            lengths, num_bytes = _write_shards(template, serialized)
            infos.append(
                tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=num_bytes, filename_template=template)
            )
        self.info.set_splits(tfds.core.splits.SplitDict(infos))


def _write_shards(template: tfds.core.ShardedFileTemplate, serialized: Iterable[bytes]) -> tuple[list[int], int]:
    lengths: list[int] = []
    total, in_shard, writer = 0, 0, None
    for example in serialized:
        if writer is None:
            path = template.sharded_filepath(shard_index=len(lengths), num_shards=None)
            # A group of one: records are read one by one. Compression finds nothing in encoded pictures.
            writer, in_shard = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed"), 0
            lengths.append(0)
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
        builder = PreferencePairs(split, records, data_dir=scratch)
        with contextlib.redirect_stdout(io.StringIO()):  # it tells where the scratch folder is
            builder.download_and_prepare()
        written = Path(builder.data_dir)
        if not builder.info.splits[split].num_examples:
            raise UserError("--source has no records.")
        for shard in written.glob(f"{NAME}-{split}.*"):
            os.replace(shard, out / shard.name)
        if (out / INFO).is_file():
            others = open_builder(out).info.splits
            builder.info.set_splits(tfds.core.splits.SplitDict([*others.values(), builder.info.splits[split]]))
            builder.info.write_to_directory(written)
        os.replace(written / "features.json", out / "features.json")
        os.replace(written / INFO, out / INFO)
    except (OSError, RuntimeError) as error:  # array_record raises the latter when the disk is full
        reason = getattr(error, "strerror", None) or str(error).partition(";")[0]
        raise UserError(f"--out={out} cannot be written ({reason}); make space or choose another place.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
