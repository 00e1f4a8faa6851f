"""Checkpoints and the identity of a working directory. The only module that imports orbax."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from spo_jax.errors import UserError

CONFIG_FILE = "config.json"


def make_manager(directory: str | Path, keep: int) -> ocp.CheckpointManager:
    """A manager that keeps the newest ``keep`` checkpoints; each appears complete or not at all."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: Any, extra: dict[str, Any]) -> None:
    """Writes ``state`` (a pytree of arrays, kept bit for bit) and ``extra`` (JSON) as checkpoint ``step``."""
    manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)))
    manager.wait_until_finished()


def restore_latest(manager: ocp.CheckpointManager, template: Any) -> tuple[Any, dict[str, Any]] | None:
    """State and extra of the newest checkpoint, or None if there is none yet.

    Args:
      manager: from ``make_manager``.
      template: a state of the same structure; the arrays come back with its shapes, dtypes and shardings.

    Raises:
      UserError: the checkpoint does not fit the template.
    """
    step = manager.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), extra=ocp.args.JsonRestore())
    try:
        restored = manager.restore(step, args=args)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(
            f"Checkpoint {manager.directory / str(step)} cannot be restored ({_first_words(error)}); delete it "
            "to go on from the one before, or choose another --workdir."
        ) from error
    return restored.state, restored.extra or {}


def _first_words(error: Exception) -> str:
    # TensorStore's messages hold whole specifications, thousands of characters long.
    return textwrap.shorten(str(error).splitlines()[0] if str(error) else type(error).__name__, 200, placeholder=" ...")


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for what is being written and releases the manager."""
    manager.wait_until_finished()
    manager.close()


def check_workdir(workdir: str | Path, config: dict[str, Any]) -> None:
    """Makes the folder and records ``config`` in it, or makes sure that the recorded one is the same.

    Raises:
      UserError: the folder belongs to a run with another config (names the first key that differs), or cannot be made.
    """
    path = Path(workdir) / CONFIG_FILE
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
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be made or written ({error.strerror}); choose another --workdir."
        ) from error


def _first_difference(old: Any, new: Any, name: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                return f"{name}.{key} is only in the {'new' if key in new else 'old'} one"
            difference = _first_difference(old[key], new[key], f"{name}.{key}")
            if difference is not None:
                return difference
        return None
    return None if old == new else f"{name} was {old!r} there and is {new!r} now"
