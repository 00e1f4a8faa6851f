"""The rows of a run, and their way into ``metrics.jsonl``, TensorBoard event files and further places."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from tensorboardX import SummaryWriter

from spo_jax.errors import UserError
from spo_jax.files import write_text

METRICS_FILE = "metrics.jsonl"
T = TypeVar("T")
# The implicit rewards: mean of the better and of the worse of a pair, of the difference, and how often it is positive.
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy")
Row = Mapping[str, float | None]  # of metrics.jsonl
Summary = Mapping[str, Any]  # what summary.json holds: JSON


class Sink(Protocol):
    """Where rows and pictures go; ``wandb_run.WandbRun`` is one as well."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def write_image(self, step: int, name: str, image: np.ndarray) -> None: ...


class MetricsWriter:
    """Writes scalars and pictures of a run into ``metrics.jsonl``, TensorBoard's events and further places.

    A context manager. ``workdir`` gets ``metrics.jsonl`` (one object a step) and ``tensorboard/``. Rows behind
    ``resume_step`` are of a run that was killed after its last checkpoint; they are dropped and will be written again.
    A row that is kept is not: a checkpoint that SIGTERM made before its step was logged may be restored a second time.
    ``more`` sinks stay open. ``enabled=False`` writes nothing, for all but one of several processes.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0, *more: Sink, enabled: bool = True):
        self._enabled, self._more = enabled, more
        if enabled:
            path = Path(workdir) / METRICS_FILE
            kept = read_metrics(path, resume_step)
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._last_kept = kept[-1]["step"] if kept else -1
            self._rows = path.open("a", encoding="utf-8")
            self._events = SummaryWriter(str(path.with_name("tensorboard")), purge_step=resume_step + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._enabled:
            self._rows.close()
            self._events.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row of scalars; one that is not finite is null in the file, because JSON has no NaN."""
        if not self._enabled or step <= self._last_kept:
            return
        row = {name: float(value) if np.isfinite(value) else None for name, value in scalars.items()}
        self._rows.write(json.dumps({"step": step, **row}) + "\n")
        self._rows.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, float(value), step)
        self._events.flush()
        for sink in self._more:
            sink.write(step, scalars)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """One picture, uint8 [H, W, 3]; ``metrics.jsonl`` has none."""
        if not self._enabled:
            return
        self._events.add_image(name, image, step, dataformats="HWC")
        self._events.flush()
        for sink in self._more:
            sink.write_image(step, name, image)


def read_metrics(path: str | Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl`` up to a step, numbers or None by name.

    They end where a line is damaged, as a kill or a full disk leaves it.
    """
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            if row["step"] <= last_step:
                rows.append(row)
    return rows


def check_finite(row: Mapping[str, float], when: str, workdir: Path) -> None:
    """Stops a run whose loss, scores or gradients are not finite ``when``; what was saved before stays."""
    broken = [name for name, value in row.items() if not np.isfinite(value)]
    if broken:
        checkpoints = workdir / "checkpoints"
        any_saved = checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
        saved = f"The last checkpoint in {checkpoints} is intact" if any_saved else "No checkpoint had been written"
        raise UserError(
            f"{broken[0]} is not finite in {when}; training stops. {saved}; lower "
            "config.train.learning_rate or check the weights."
        )


def window_to_json(window: Sequence[Any]) -> list[dict[str, Any]]:
    """Metrics of some updates, as a checkpoint keeps them that is written before they are logged; every bit is kept.

    Each is a dataclass of int32 and float32 scalars, or of dicts of them.
    """
    return [jax.tree.map(lambda x: x.item(), vars(metrics)) for metrics in jax.device_get(window)]


def window_from_json(kind: Callable[..., T], rows: Sequence[Mapping[str, Any]]) -> list[T]:
    """What ``window_to_json`` was given, on the host; ``kind`` is the dataclass."""

    def exact(value: float) -> np.generic:
        return np.int32(value) if isinstance(value, int) else np.float32(value)

    return [kind(**jax.tree.map(exact, dict(row))) for row in rows]


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Writes the summary as JSON, complete or not at all; a number that is not finite becomes null."""
    write_text(Path(path), json.dumps(_finite(summary), indent=2, sort_keys=True, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
