"""What a plan says: a table of a run's memory and work on each device."""

from __future__ import annotations

import dataclasses
from typing import Any

from spo_jax.planning.collectives import Traffic
from spo_jax.planning.shapes import num_parameters
from spo_jax.planning.targets import GIB, Target
from spo_jax.runs.assembly import Assembly


@dataclasses.dataclass(frozen=True)
class Need:
    """What one program needs on each device.

    Attributes:
      program: its name.
      flops: of matrix products and convolutions, all rounds of its loops.
      own: bytes beside what is resident: arguments, temporary arrays, results, code.
      peak: bytes in all; of a program that the compiler gave up, at least that.
      fits: whether that is within the limit.
      traffic: its collectives; None if it was not compiled, or its text cannot be read.
      seconds: that compiling took; None if it was not compiled.
      problem: what the compiler said, if it gave no numbers.
    """

    program: str
    flops: float
    own: int
    peak: int
    fits: bool
    traffic: Traffic | None = None
    seconds: float | None = None
    problem: str = ""


def table(run: Assembly, resident: dict[str, int], needs: list[Need], target: Target) -> str:
    """The plan as text: what stays on a device, then a row for each program."""
    limit = f" of {target.limit / GIB:.2f} GiB" if target.limit else ""
    rows = [["stays on each device", "parameters", "GiB"]]
    for name, size in resident.items():
        if size:
            rows.append([name, f"{num_parameters(run.resident[name]) / 1e6:,.1f} M", _gib(size)])
    rows.append(["together", "", _gib(sum(resident.values()))])
    programs = [["program", "own GiB", f"peak GiB{limit}", "TFLOP", "collectives", "compiled in"]]
    for need in needs:
        share = f" ({100 * need.peak / target.limit:.0f} %)" if target.limit else ""
        peak = need.problem or f"{_gib(need.peak)}{share}{'' if need.fits else ', does not fit'}"
        seconds = "-" if need.seconds is None else f"{need.seconds:.0f} s"
        programs.append(
            [need.program, _gib(need.own), peak, f"{need.flops / 1e12:,.2f}", _words(need.traffic), seconds]
        )
    return f"{_aligned(rows)}\n\n{_aligned(programs)}"


def overrides(changed: dict[str, Any]) -> str:
    """Keys and values as they are written on a command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changed.items())


def _words(traffic: Traffic | None) -> str:
    if traffic is None:
        return "-"
    if not traffic.counts:
        return "none"
    words = [f"{count:,} {kind} {_size(traffic.bytes[kind])}" for kind, count in traffic.counts.items()]
    loops = ["and loops of unknown length"] if traffic.unknown_loops else []
    return ", ".join(words + loops)


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
