"""Batches of preference pairs: prepared records, shuffled, decoded in worker processes, resumable to the record.

The stream of a seed is all epochs one after the other, each in its own order; a record's position is its place in this
stream. All processes together take the next positions as one global batch, of which process i of n has the rows i::n.
So batches are the same for any number of processes, and a state is little more than a position.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from multiprocessing import parent_process
from typing import NamedTuple

import grain
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from spo_jax.data.augmentation import NO_AUGMENTATION, Augmentation, check_augmentation, draw_views
from spo_jax.data.places import EMOJI_PAIRS, pairs_folder
from spo_jax.data.records import FAULTS, Fault, Records, decode_pair, is_tied
from spo_jax.errors import UserError
from spo_jax.formats.json_files import Json

_BUFFER_BYTES = 12 * 2**20  # of decoded images that wait in a worker


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """B preference pairs."""

    captions: list[str]
    images: np.ndarray  # uint8 [B, 2, H, W, 3]
    # int32 [B, 2, 4]: of each image its original height and width, and top and left of the cut in the resized image,
    # before it was mirrored; what SDXL is told. 0 in rows without a record.
    crops: np.ndarray
    labels: np.ndarray  # float32 [B, 2], preference for each image; they add up to 1, a tie is (0.5, 0.5)
    weights: np.ndarray  # float32 [B], 1 / num_example_per_prompt; 0 where there is no record, or none that can be used
    positions: np.ndarray  # int64 [B], place in the stream over all epochs and processes; -1 for rows of weight 0


def open_pairs(name: str) -> Records:
    """The records of ``FOLDER@SPLIT``, as ``python -m spo_jax.prepare`` has written them: has a length and an index.

    ``emoji:pairs@SPLIT`` are those of the emoji world, which ``python -m spo_jax.emoji.pairs --prepared`` makes.

    UserError if there is no such folder, split or file of it, or its preparation has not come to an end.
    """
    from spo_jax.data.builder import INFO, open_builder  # tfds: the loader does not need it

    place, at, split = name.rpartition("@")
    if not (at and place and split):
        raise UserError(f"Data {name!r} must be written as FOLDER@SPLIT, for example data/pickapic@train.")
    folder = pairs_folder(place)
    if not (folder / INFO).is_file():
        if place == EMOJI_PAIRS:
            raise UserError(f"{name} is not here yet; python -m spo_jax.emoji.pairs --prepared makes it, in minutes.")
        raise UserError(
            f"Folder {folder} holds no prepared data (or its preparation was interrupted); "
            f"run python -m spo_jax.prepare --source=... --split={split} --out={folder}."
        )
    builder = open_builder(folder)
    splits = builder.info.splits
    if split not in splits:
        raise UserError(f"Folder {folder} has no split {split!r}, only {', '.join(sorted(splits))}.")
    for path in splits[split].filepaths:
        if not path.is_file():
            raise UserError(f"File {path} of {name!r} is missing; copy it there, or prepare the split again.")
    return builder.as_data_source(split)


class PairLoader:
    """An iterator of ``PairBatch``.

    Every good record comes exactly once an epoch, and one that cannot be used leaves a row of weight 0. With
    ``num_epochs=None`` batches never end, and one may hold records of two epochs. With a number of epochs every process
    makes ``num_batches`` of them, and fills the last ones with rows of weight 0.

    Args:
      source: as ``open_pairs`` gives it.
      batch_size: B, of this process; a global batch is ``process_count`` times as large.
      size: (H, W) of the images.
      seed: of the order; any integer.
      state: from ``state()`` of another loader: this one continues with the next batch. The number of workers and
        of processes and the batch size may have changed.
      shuffle: whether each epoch has an order of its own, or that of the source.
      num_workers: processes that decode; 0 does it here.
      strict: a fault ends the run.
      keep_only_with_label: leaves out records whose ``has_label`` is false, which counts as unlabelled, not as a fault.
      drop_ties: leaves out records whose labels are equal, which counts as tied, not as a fault.
      augmentation: see there. A state goes on with another one as well.
      process_index, process_count: which share of each batch this process takes.

    Raises:
      UserError: a fault with ``strict``; a state of other data or another order; no record that can be used.
    """

    def __init__(
        self,
        source: Records,
        *,
        batch_size: int,
        size: tuple[int, int],
        seed: int,
        state: Json | None = None,
        shuffle: bool = True,
        num_epochs: int | None = None,
        num_workers: int = 2,
        strict: bool = False,
        keep_only_with_label: bool = True,
        drop_ties: bool = False,
        augmentation: Augmentation = NO_AUGMENTATION,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not (batch_size > 0 and num_workers >= 0 and 0 <= process_index < process_count):
            raise ValueError(f"{batch_size=}, {num_workers=}, {process_index=} of {process_count=} do not make sense.")
        check_augmentation(augmentation)
        self._batch_size, self._size, self._strict = batch_size, size, strict
        self._process_index, self._process_count = process_index, process_count
        self._stream = {"num_records": len(source), "seed": seed, "shuffle": shuffle}
        self._stream |= {"keep_only_with_label": keep_only_with_label, "drop_ties": drop_ties}
        self._position, self._counts = 0, dict.fromkeys(("used", "unlabelled", "tied", *FAULTS), 0)
        if state is not None:
            self._restore(state)
        self._end = None if num_epochs is None else num_epochs * len(source)
        self.num_batches = None if self._end is None else -(-self._end // (batch_size * process_count))
        reading = _Reading(size, seed, augmentation, keep_only_with_label, drop_ties)
        self._decode = functools.partial(_decode, source, reading)
        self._some_usable = False  # as far as is known

        records = grain.MapDataset.range(len(source)).seed(seed % 2**32)
        records = (records.shuffle() if shuffle else records).repeat(num_epochs)
        rows = records.map_with_index(self._decode)[self._position + process_index :: process_count]
        # No threads: each would hold decoded images of its own.
        stream = rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        item = 6 * size[0] * size[1]
        buffer = max(2, min(batch_size, _BUFFER_BYTES // item))
        # In a worker, in grain's thread for it, in the batch; and grain frees up to 50 behind our back.
        in_flight = 2 * num_workers * (buffer + 2) + batch_size + 50
        options = grain.experimental.DatasetOptions(min_shm_size=_min_shm_size(in_flight * item))
        stream = grain.experimental.WithOptionsIterDataset(stream, options)
        workers = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=buffer)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain asks for flags of its own, also where no command has parsed them
        self._rows = iter(stream.mp_prefetch(workers, worker_init_fn=_start_worker))

    def __iter__(self) -> PairLoader:
        return self

    def __next__(self) -> PairBatch:
        """The next batch; StopIteration after ``num_batches``."""
        if self._end is not None and self._position >= self._end:
            raise StopIteration
        rows = list(itertools.islice(self._rows, self._batch_size))  # fewer at the end
        behind = self._position + self._batch_size * self._process_count
        places = range(self._position + self._process_index, behind, self._process_count)
        assert all(row["position"] == place for row, place in zip(rows, places, strict=False))
        outcomes = [row.get("reason", "used") for row in rows]
        for row, outcome in zip(rows, outcomes, strict=True):
            if self._strict and outcome in FAULTS:
                raise UserError(
                    f"Record {row['record']} of the data cannot be used ({outcome}: {FAULTS[outcome]}); "
                    "mend it and prepare again, or skip such records with config.data.strict=False."
                )
        if not self._some_usable and "used" not in outcomes:
            self._find_usable()
        self._some_usable = True
        # Not before: what an interruption finds half collected has not been handed out.
        self._position = behind
        self._counts = {name: count + outcomes.count(name) for name, count in self._counts.items()}
        filler: Json = {"caption": "", "images": np.zeros((2, *self._size, 3), np.uint8), "weight": 0.0, "position": -1}
        filler |= {"crops": np.zeros((2, 4), np.int32), "labels": np.full(2, 0.5, np.float32)}
        full = [filler if "reason" in row else row for row in rows]
        full += [filler] * (self._batch_size - len(full))
        return PairBatch(
            captions=[row["caption"] for row in full],
            images=np.stack([row["images"] for row in full]),
            crops=np.stack([row["crops"] for row in full]),
            labels=np.stack([row["labels"] for row in full]),
            weights=np.array([row["weight"] for row in full], np.float32),
            positions=np.array([row["position"] for row in full], np.int64),
        )

    def state(self) -> Json:
        """What has been handed out so far, as JSON can hold it: the next position, counts, and which stream it is.

        Position and stream are those of all processes. ``counts`` has ``used``, ``unlabelled``, ``tied`` and the names
        in ``FAULTS``: the records of this process's share since it began, and on process 0 those of the state that it
        began with. A checkpoint keeps the ``total_state`` of it.
        """
        return {"position": self._position, "counts": dict(self._counts), "stream": dict(self._stream)}

    def close(self) -> None:
        """Ends the worker processes."""
        self._rows.close()

    def _restore(self, state: Json) -> None:
        saved = {"drop_ties": False} | state["stream"]  # earlier versions kept them, and have no such key
        for key, value in self._stream.items():
            if saved.get(key) != value:
                raise UserError(
                    f"The saved state of the data has {key} = {saved.get(key)}, this run {value}; "
                    "go on with the data and settings it was saved with, or start anew."
                )
        self._position = state["position"]
        if self._process_index == 0:  # so that the sum over processes is right, whatever their number was
            self._counts |= state["counts"]

    def _find_usable(self) -> None:
        # This share may be without a good record for ever, though others have some: only all records tell.
        reasons: Counter[str] = Counter()
        for number in range(self._stream["num_records"]):
            row = self._decode(number, number)
            if "reason" not in row:
                return
            reasons[row["reason"]] += 1
        counts = ", ".join(f"{count} {name}" for name, count in reasons.items())
        raise UserError(f"None of the {reasons.total()} records of the data can be used ({counts}).")


class _Reading(NamedTuple):
    """How a worker reads records; see ``PairLoader``."""

    size: tuple[int, int]
    seed: int
    augmentation: Augmentation
    keep_only_with_label: bool
    drop_ties: bool


def _decode(source: Records, reading: _Reading, position: int, number: int) -> Json:
    """What a worker does: (position in the stream, record number) to a row, or the reason why there is none."""
    row = {"position": position, "record": number}
    try:
        record = source[number]
    except Exception:  # array_record and tfds raise whatever they meet in a damaged file
        return {**row, "reason": "record_broken"}
    if reading.keep_only_with_label and not record["has_label"]:
        return {**row, "reason": "unlabelled"}
    if reading.drop_ties and is_tied(record):
        return {**row, "reason": "tied"}
    views = draw_views(reading.augmentation, reading.seed, position)
    try:
        return {**row, **decode_pair(record, reading.size, views)}
    except Fault as fault:
        return {**row, "reason": str(fault)}


def _min_shm_size(needed: int) -> int:
    # A container's shared memory is often 64 MB, and a worker that writes beyond it dies. Then a pipe has to do: as
    # fast, but grain may wait half a minute for a worker when it closes.
    try:
        return 0 if shutil.disk_usage("/dev/shm").free > 2 * needed else sys.maxsize
    except OSError:
        return sys.maxsize


def _start_worker(index: int, count: int) -> None:
    import jax  # grain has imported it already

    jax.config.update("jax_platforms", "cpu")  # the accelerator belongs to the parent
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent gets these as well, and ends its workers when it leaves
        signal.signal(number, signal.SIG_IGN)

    def die_with_parent() -> None:
        # A parent that was killed could not tell grain's workers to stop, and they would wait for it for ever.
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def total_state(state: Json) -> Json:
    """The state of a ``PairLoader`` with the counts of all processes, which all call this: any number can resume it."""
    counts = state["counts"]
    by_process = multihost_utils.process_allgather(np.array(list(counts.values()), np.int32))  # JAX has no int64 here
    return state | {"counts": dict(zip(counts, by_process.sum(axis=0).tolist(), strict=True))}
