"""The loop of a run, whatever its method: restoring, SIGTERM, progress, metrics, saving.

with Loop(folder, state, Unit("SPO", "batch", 60)) as loop:    from the last checkpoint on
    for step in loop.steps():
        ...                                                    computes the next state
        loop.advance(state)                                    one step is done
        loop.log(row)                                          ends the run if a number is not finite
        if loop.due(every): loop.save()
(the end saves what is not saved)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from spo_jax.distributed.processes import is_main_process
from spo_jax.runs import checkpoint, preemption, wandb_run
from spo_jax.runs.metrics import MetricsWriter, check_finite
from spo_jax.runs.state import TrainState

PROFILE_FOLDER = "profile"
COMPILING = "compiling"  # what stands beside the progress bar until the first step of a process is done
T = TypeVar("T")


class RunFolder(NamedTuple):
    """Where a run lives: its config, its --workdir, and the commits that were looked up (see ``artifacts.ready``)."""

    config: ConfigDict
    path: Path
    pins: dict[str, str]


class Unit(NamedTuple):
    """What the loop counts: its title on the progress bar, the name of one step ("batch", "step"), and how many."""

    title: str
    name: str
    total: int


class Loop:
    """A run in its workdir, from the last checkpoint on; a context manager.

    Attributes:
      workdir: of the run.
      unit: what is counted.
      state: after ``finished`` steps.
      finished: steps so far.
      first: steps at the start of this process.
      extra: what the last checkpoint had beside the arrays, as JSON.
      on_save: called with the state at each save, in all processes; what it returns is kept beside the arrays.
      run: on W&B.
    """

    def __init__(
        self,
        folder: RunFolder,
        state: TrainState,
        unit: Unit,
        extra: Mapping[str, Any] | None = None,
    ):
        """Restores the last checkpoint.

        Args:
          folder: of the run; its config is recorded there, or compared with what is recorded.
          state: before the first step.
          unit: what is counted.
          extra: what ``Loop.extra`` is before the first step.

        Raises:
          UserError: the workdir is that of another run, or its checkpoints are damaged.
        """
        config, workdir, pins = folder
        checkpoint.check_workdir(workdir, config.to_dict(), pins)
        self._config, self.workdir, self.unit = config, workdir, unit
        self._manager = checkpoint.make_manager(workdir / "checkpoints", config.checkpoint.keep)
        restored = checkpoint.restore_latest(self._manager, state)
        fresh: dict[str, Any] = {unit.name: 0, "seconds": 0.0, **(extra or {})}
        self.state: TrainState = state if restored is None else restored[0]
        self.extra: dict[str, Any] = fresh if restored is None else restored[1]
        self.first = self.finished = self._saved = self.extra[unit.name]
        self.on_save: Callable[[TrainState], Mapping[str, Any] | None] = lambda state: None
        self.run = wandb_run.start(config, workdir, self.first)
        self._seconds_before, self._began = self.extra["seconds"], time.time()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            main, unit = is_main_process(), self.unit
            self.preempted = stack.enter_context(preemption.watch())
            self._writer = stack.enter_context(MetricsWriter(self.workdir, self.first, self.run, enabled=main))
            bar = {"unit": unit.name, "dynamic_ncols": True, "disable": not main}
            self.progress = stack.enter_context(tqdm(total=unit.total, initial=self.first, desc=unit.title, **bar))
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if kind is None:
                self.save()
                checkpoint.close(self._manager)
                if self.preempted():
                    preemption.say_stopped(self.unit.name, self.finished)

    def steps(self) -> Iterator[int]:
        """The numbers, from 0, of the steps that are left; ends early when SIGTERM has come.

        ``config.profile`` of them are traced, after the first one of this process, which compiles.
        """
        traced = range(self.first + 1, self.first + 1 + self._config.profile)
        self.progress.set_postfix_str(COMPILING)
        with contextlib.ExitStack() as trace:
            for step in range(self.first, self.unit.total):
                if traced and step == traced.start:
                    trace.enter_context(jax.profiler.trace(self.workdir / PROFILE_FOLDER))
                yield step
                if traced and step == traced.stop - 1:
                    jax.block_until_ready(self.state)
                    trace.close()
                if self.preempted():
                    return

    @property
    def seconds(self) -> float:
        """Of the loop, those before an interruption included."""
        return self._seconds_before + time.time() - self._began

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, is to happen now; 0: never."""
        return bool(every) and (self.finished == self.unit.total or self.finished % every == 0)

    def advance(self, state: TrainState) -> None:
        """Takes the state of one step more."""
        self.state, self.finished = state, self.finished + 1
        self.progress.set_postfix_str("", refresh=False)
        self.progress.update()

    def log(self, row: Mapping[str, float], *shown: str) -> None:
        """Writes the row of the steps up to ``finished``; ``shown`` names what stands beside the progress bar.

        Raises:
          UserError: a number is not finite.
        """
        self.check(row)
        self.progress.set_postfix({name: f"{row[name]:.4f}" for name in shown})
        self._writer.write(self.finished, row)

    def check(self, row: Mapping[str, float]) -> None:
        """Raises UserError if a number is not finite."""
        check_finite(row, f"{self.unit.name} {self.finished}", self.workdir)

    def enter(self, opened: contextlib.AbstractContextManager[T]) -> T:
        """Opens something that is closed at the end of the loop, after the last save."""
        return self._open.enter_context(opened)

    def show(self, name: str, image: np.ndarray) -> None:
        """Logs an image, uint8 [H, W, 3]."""
        self._writer.write_image(self.finished, name, image)

    def save(self) -> None:
        """Writes a checkpoint of the state, unless it is there."""
        if self._saved != self.finished:
            kept = self.on_save(self.state) or {}
            extra = {**kept, self.unit.name: self.finished, "seconds": self.seconds}
            checkpoint.save(self._manager, self.finished, self.state, extra)
            self._saved = self.finished
