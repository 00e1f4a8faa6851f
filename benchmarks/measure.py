"""What both programs of ``benchmarks.against_pytorch`` are told, and how their time and memory are measured.

Imports nothing but Python: the memory of a process is to be that of its own program.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

GIB = 2**30
MAX_OTHERS = 0.15  # cores that other programs may use, on average, for a measurement on the CPU that means something
# PyTorch's threads wait for each other at the end of each operation, so one that is held up holds up all.
DISTURBED = "warning: other programs were running; they slow PyTorch down far more than ours. Measure again without."


class Work(NamedTuple):
    """An iteration.

    Attributes:
      texts: the B prompts of every batch.
      pixels: side of the images; candidates: k; steps: N; plain_steps: d.
      minibatch: pairs of an update; rank: of the adapters.
      guidance: w; beta, clip_range: of the loss; learning_rate, betas, eps, weight_decay: of AdamW.
    """

    texts: list[str]
    pixels: int
    candidates: int
    steps: int
    plain_steps: int
    minibatch: int
    rank: int
    guidance: float
    beta: float
    clip_range: float
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def pairs(self) -> int:
        """Of an iteration."""
        return len(self.texts) * (self.steps - self.plain_steps)


class Turn(NamedTuple):
    """What a process is to measure.

    Attributes:
      size: in ``models.SIZES``; folder: of its models; work: of its iteration.
      device: "cpu" or "gpu"; dtype: in which networks compute; repeats: batches after the first.
    """

    size: str
    folder: str
    work: Work
    device: str
    dtype: str
    repeats: int


def turn_of(text: str) -> Turn:
    """A turn as ``json.dumps`` writes it."""
    turn = Turn(*json.loads(text))
    return turn._replace(work=Work(*turn.work))


class Batch(NamedTuple):
    """Seconds of the two phases of a batch, the mean of its scores and of its losses."""

    sampling: float
    update: float
    score: float
    loss: float


def measured(
    batches: Iterator[Batch], repeats: int, on_gpu: tuple[Callable[[], float], Callable[[], None]] | None
) -> dict[str, Any]:
    """Medians over the batches after the first, and peaks of memory: of this process, or of the device."""
    peak, forget = on_gpu or (host_peak, forget_host_peak)
    first = next(batches)
    first_peak = peak()
    forget()
    began, busy = time.perf_counter(), others_seconds()
    later = [next(batches) for _ in range(repeats)]
    busy = (others_seconds() - busy) / (time.perf_counter() - began)
    later_peak = peak()
    iteration = median(batch.sampling + batch.update for batch in later)
    return {
        "sampling": median(batch.sampling for batch in later),
        "update": median(batch.update for batch in later),
        "iteration": iteration,
        "first_batch_more": first.sampling + first.update - iteration,
        "peak_gib": max(first_peak, later_peak),
        "later_peak_gib": later_peak,
        "other_programs_cores": busy,
        "score": fmean(batch.score for batch in (first, *later)),
        "loss": fmean(batch.loss for batch in (first, *later)),
    }


def others_seconds() -> float:
    """CPU seconds that all programs but this one have used so far; 0 where the system does not tell (not Linux)."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return 0.0
    user, nice, system, _idle, _waiting, *interrupts = map(int, counters.read_text().split("\n")[0].split()[1:8])
    own = os.times()
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def host_peak() -> float:
    """GiB of this process at its peak; of Linux by the counter that ``forget_host_peak`` starts again."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def forget_host_peak() -> None:
    """The peak is counted from now on, where the system can do that (Linux)."""
    counter = Path("/proc/self/clear_refs")
    if counter.exists():
        counter.write_text("5")
