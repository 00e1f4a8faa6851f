"""Checkpoints and the identity of a working directory. The only module that imports orbax.

Arrays are written in the background, large ones by all processes together. A checkpoint gets its name, its step, when
it is complete; beside the arrays it holds the checksums of its files, by which damage is found before anything is read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from spo_jax.distributed.agreement import agree
from spo_jax.errors import UserError, notice
from spo_jax.files import write_text
from spo_jax.runs.artifacts import PINS_FILE

CONFIG_FILE = "config.json"
CHECKSUMS_FILE = "checksums.json"
# What may change when a run goes on: where and how fast it computes and where it is shown, not what it computes.
FREE_KEYS = (
    "attention",
    "checkpoint",
    "chunk",
    "data.num_workers",
    "evaluation.batch_size",
    "evaluation.every",
    "evaluation.metrics",
    "mesh",
    "offload",
    "profile",
    "remat",
    "scorer.chunk",
    "validation.batch_size",
    "wandb",
)
# Keys that configs did not always have, with what runs did before they had them.
ADDED_KEYS = {
    "loss.kind": "spo",
    "pairs.kind": "best_worst",
    "pairs.timesteps": [0, 1000],
    "scorer.kind": "image",
    "train.warmup": "linear",
    "unet": "",
}
_ARRAYS, _EXTRA = "state", "extra"  # the parts of a checkpoint
_BLOCK = 2**20
_SLICE = 2**20  # bytes; devices that hold the same array share its writing, and each slice is a program to compile


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # JAX's preemption manager counts how often it is asked; runs/preemption.py alone asks it.
        return False


def make_manager(directory: str | Path, keep: int) -> ocp.CheckpointManager:
    """A manager that keeps the newest ``keep`` checkpoints; each appears complete or not at all.

    What an interrupted run left half written is deleted.
    """
    directory = Path(directory).absolute()
    kinds = ocp.type_handlers
    registry = kinds.create_type_handler_registry(
        (jax.Array, kinds.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE)),
        (np.ndarray, kinds.NumpyHandler()),
    )
    handlers = {
        _ARRAYS: ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        _EXTRA: ocp.JsonCheckpointHandler(),
    }
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # would read files, which may be damaged
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _write_checksums(directory)),
    )
    # What orbax logs as an error in the background it also raises, and then it is said in one sentence.
    logging.getLogger("absl").addFilter(lambda said: said.levelno < logging.ERROR or "orbax" not in said.pathname)
    with _failures(directory):
        return _Manager(directory, options=options, item_handlers=handlers)


def save(manager: ocp.CheckpointManager, step: int, state: Any, extra: dict[str, Any]) -> None:
    """Starts to write ``state`` (a pytree of arrays, kept bit for bit) and ``extra`` (JSON) as checkpoint ``step``.

    When this returns the arrays have been copied to the host, so that ``state`` may be donated. One checkpoint is
    written at a time: this waits for the one before, and raises UserError if that one could not be written, or this one
    cannot be started.
    """
    parts = {_ARRAYS: ocp.args.PyTreeSave(state), _EXTRA: ocp.args.JsonSave(extra)}
    with _failures(Path(manager.directory)):
        manager.save(step, args=ocp.args.Composite(**parts), force=True)


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for what is being written and releases the manager; UserError if it could not be written."""
    with _failures(Path(manager.directory)):
        manager.close()


def restore_latest(manager: ocp.CheckpointManager, template: Any) -> tuple[Any, dict[str, Any]] | None:
    """State and extra of the newest checkpoint that is not damaged, or None if there is no checkpoint yet.

    A damaged one that is newer is named in a warning and renamed ``N.damaged``, so that its step can be written again.
    The number of devices and processes may be another one than when it was written. The arrays come back with the
    shapes, dtypes and shardings of ``template``, a state of the same structure.

    Raises:
      UserError: all checkpoints are damaged, or the newest good one does not fit the template; nothing is renamed then.
    """
    step = agree(lambda: _choose(Path(manager.directory)))
    if step < 0:
        return None
    manager.reload()
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    places = ocp.checkpoint_utils.construct_restore_args(abstract)
    parts = {_ARRAYS: ocp.args.PyTreeRestore(abstract, restore_args=places), _EXTRA: ocp.args.JsonRestore()}
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**parts))
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(
            f"Checkpoint {manager.directory / str(step)} is intact, but does not fit this model and config "
            f"({_first_words(error)}); choose another --workdir."
        ) from error
    return restored[_ARRAYS], restored[_EXTRA] or {}


# -------------------------------------------------------------------------------------------------- damage and failures
def _choose(directory: Path) -> int:
    """The newest checkpoint that is not damaged, -1 if there is none; puts damaged ones that are newer aside."""
    faults = {}
    for step in _steps(directory):
        if (fault := _fault(directory / str(step))) is None:
            break
        faults[step] = fault
    else:
        if not faults:
            return -1
        newest, fault = next(iter(faults.items()))
        raise UserError(
            f"No checkpoint in {directory} can be restored ({newest}: {fault}); move that folder away to start from "
            "the beginning, or choose another --workdir."
        )
    for damaged, fault in faults.items():
        names = itertools.chain(
            [f"{damaged}.damaged"], (f"{damaged}.damaged-{number}" for number in itertools.count(2))
        )
        aside = next(name for name in names if not (directory / name).exists())
        (directory / str(damaged)).rename(directory / aside)
        notice(
            f"warning: checkpoint {directory / str(damaged)} is damaged ({fault}); going on from checkpoint {step} "
            f"instead. The damaged one is now {aside}."
        )
    return step


def _steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that are complete, the newest first."""
    return sorted((int(path.name) for path in directory.iterdir() if path.name.isdecimal()), reverse=True)


def _fault(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything is."""
    try:
        recorded = json.loads((checkpoint / CHECKSUMS_FILE).read_bytes())
        found = _checksums(checkpoint)
    except (OSError, ValueError) as error:
        return f"its {CHECKSUMS_FILE} or another file cannot be read: {_first_words(error)}"
    if recorded == found:
        return None
    names = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    return f"{names[0]} {'is not what was written' if names[0] in found else 'is missing'}"


def _checksums(checkpoint: Path) -> dict[str, list[int]]:
    """Size and CRC of every file of arrays and extra."""
    sums = {}
    for path in sorted(path for part in (_ARRAYS, _EXTRA) for path in (checkpoint / part).rglob("*") if path.is_file()):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                crc = zlib.crc32(block, crc)
        sums[path.relative_to(checkpoint).as_posix()] = [path.stat().st_size, crc]
    return sums


def _write_checksums(directory: Path) -> None:
    # Called by process 0 when all have written, shortly before the checkpoint gets its name; there is only one.
    for checkpoint in directory.glob("*.orbax-checkpoint-tmp*"):
        (checkpoint / CHECKSUMS_FILE).write_text(json.dumps(_checksums(checkpoint)), encoding="utf-8")


@contextlib.contextmanager
def _failures(directory: Path) -> Iterator[None]:
    """Turns what orbax raises when it cannot write into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))  # in TensorStore's messages
        reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or _first_words(error)
        steps = _steps(directory) if directory.is_dir() else []
        good = f"the last good checkpoint is {steps[0]}" if steps else "there is no good one before it"
        raise UserError(
            f"A checkpoint could not be written to {directory} ({reason}); {good}. Free some space, "
            "or mend what else is wrong there, and run the same command again to go on."
        ) from error


def _first_words(error: Exception) -> str:
    # TensorStore's messages hold whole specifications, thousands of characters long.
    return textwrap.shorten(str(error).splitlines()[0] if str(error) else type(error).__name__, 200, placeholder=" ...")


# -------------------------------------------------------------------------------------------------- working directory
def check_workdir(workdir: str | Path, config: dict[str, Any], pins: dict[str, str] | None = None) -> None:
    """Makes the folder and records ``config`` in it, or makes sure that the recorded one is the same.

    ``pins``, the commits that were looked up for it, are recorded too (see ``runs/artifacts.py``).
    The keys in ``FREE_KEYS`` may differ: they do not change what a run computes. A run that is older than a key in
    ``ADDED_KEYS`` has the value there. The file keeps the first config.

    Raises:
      UserError: the folder belongs to a run with another config (names the first key that differs), or cannot be made.
    """
    path = Path(workdir) / CONFIG_FILE

    def check() -> int:
        if path.is_file():
            try:
                recorded = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"File {path} is damaged ({error}); choose another --workdir.") from error
            difference = _first_difference(recorded, json.loads(json.dumps(config)), "config")
            if difference is not None:
                raise UserError(
                    f"--workdir={workdir} belongs to a run with another config ({difference}); "
                    "choose another --workdir, or start with the config of that run."
                )
            return 0
        # The pins before the config, without which there is no run.
        files = {PINS_FILE: pins, CONFIG_FILE: config} if pins else {CONFIG_FILE: config}
        try:
            for name, values in files.items():
                write_text(path.with_name(name), json.dumps(values, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            raise UserError(
                f"--workdir={workdir} cannot be made or written ({error.strerror}); choose another --workdir."
            ) from error
        return 0

    agree(check)


def _first_difference(old: Any, new: Any, name: str) -> str | None:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return None if old == new else f"{name} was {old!r} there and is {new!r} now"
    for key in sorted(old.keys() | new.keys()):
        path = f"{name}.{key}".removeprefix("config.")
        if path in FREE_KEYS:
            continue
        if path in ADDED_KEYS:
            old = {key: ADDED_KEYS[path]} | old
        if key not in old or key not in new:
            return f"{name}.{key} is only in the {'new' if key in new else 'old'} one"
        if (difference := _first_difference(old[key], new[key], f"{name}.{key}")) is not None:
            return difference
    return None
