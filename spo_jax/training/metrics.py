"""Metrics as sums and counts, and their way into ``metrics.jsonl`` and TensorBoard event files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars and pictures of a run; a context manager.

    Args:
      workdir: gets ``metrics.jsonl`` (one object a step) and ``tensorboard/``.
      resume_step: rows with a later step are of a run that was killed after its last checkpoint; they are dropped
        and will be written again.
    """

    def __init__(self, workdir: str | Path, resume_step: int = 0):
        path = Path(workdir) / METRICS_FILE
        _truncate(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._events = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._events.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row of scalars; a number that is not finite is written as null, because JSON has no NaN."""
        row = {name: float(value) if np.isfinite(value) else None for name, value in scalars.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, float(value), step)
        self._events.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """One picture, uint8 [H, W, 3]."""
        self._events.add_image(name, image, step, dataformats="HWC")
        self._events.flush()


def read_metrics(path: str | Path) -> list[dict[str, float | None]]:
    """The rows of a ``metrics.jsonl``; they end where a line is damaged, as a kill or a full disk leaves it."""
    rows = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def _truncate(path: Path, last_step: int) -> None:
    rows = [row for row in read_metrics(path) if (row["step"] or 0) <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
