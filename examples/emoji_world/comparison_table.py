"""Table and picture of ``comparison.py``: preference gain against training FLOPs and seconds, from its runs' files.

The gain is that of the mean true preference of held-out captions over the base model, in standard deviations of the
base model's images. Intervals are of 95 %, Student's t over the seeds. What a step costs in seconds is the median over
a run's rows, so that compiling, measuring and a busy moment do not count.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.emoji_world.study_table import over_seeds
from spo_jax.files import write_text
from spo_jax.formats.json_files import read_json
from spo_jax.runs.metrics import read_metrics

METRIC = "colorfulness"
INKS = ("#0a7d6c", "#b4501e")


class Found(NamedTuple):
    """A method's files, some of which may be missing: settings of its tries, their folders, those of its runs by seed,
    and the FLOPs of a call of each program."""

    method: str
    settings: Sequence[Mapping[str, Any]]
    tries: Sequence[Path]
    runs: Sequence[Path]
    flops: Mapping[str, float]


class Curve(NamedTuple):
    """A run's gains [n], the training FLOPs and seconds until each, and the alignment lost at the end."""

    gains: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    alignment_lost: float


def write(workdir: Path, found: Mapping[str, Found], judge_flops: float) -> None:
    """Writes ``comparison.json``, ``comparison.md`` and ``comparison.svg``."""
    curves = {name: [curve_of(some, run) for run in some.runs if _done(run)] for name, some in found.items()}
    record = {
        "judge_flops": judge_flops,
        "tries": {name: tries_of(some) for name, some in found.items()},
        "flops": {name: dict(some.flops) for name, some in found.items()},
        "curves": {
            name: [{key: np.asarray(value).tolist() for key, value in curve._asdict().items()} for curve in some]
            for name, some in curves.items()
        },
    }
    write_text(workdir / "comparison.json", json.dumps(record, indent=1) + "\n")
    lines = [*_tries_table(found), ""]
    if all(curves.values()):
        lines += _costs_table(curves, judge_flops)
        write_text(workdir / "comparison.svg", drawing(curves, judge_flops))
    write_text(workdir / "comparison.md", "\n".join(lines) + "\n")


def _done(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def tries_of(found: Found) -> list[dict[str, Any]]:
    """The tries that are there: their settings, gain and alignment lost."""
    rows = []
    for setting, folder in zip(found.settings, found.tries, strict=True):
        if _done(folder):
            summary = read_json(folder / "summary.json")
            base, tuned = summary["base"], summary["tuned"]
            gain = (tuned[METRIC] - base[METRIC]) / summary["base_std"][METRIC]
            rows.append({**setting, "gain": gain, "alignment_lost": base["alignment_top1"] - tuned["alignment_top1"]})
    return rows


def curve_of(found: Found, folder: Path) -> Curve:
    """What a finished run says."""
    summary, rows = read_json(folder / "summary.json"), read_metrics(folder / "metrics.jsonl")
    base, spread = summary["base"][METRIC], summary["base_std"][METRIC]
    times = ("seconds_pool", "seconds_score", "seconds_update")
    steps = np.array([row["step"] for row in rows], float)
    seconds = np.array([sum(row.get(key) or 0.0 for key in times) for row in rows]) / np.diff(steps, prepend=0.0)
    if found.method == "spo":
        each = found.flops["encode"] + found.flops["pool"] + found.flops["score"]
        spent = np.cumsum([each + row["num_updates"] * found.flops["update"] for row in rows])
    else:
        accumulation = summary["config"]["train"]["accumulation_steps"]
        spent = steps * accumulation * found.flops["update"]
    measured = [i for i, row in enumerate(rows) if row.get(f"evaluation/{METRIC}") is not None]
    gains = np.array([(rows[i][f"evaluation/{METRIC}"] - base) / spread for i in measured])
    lost = summary["base"]["alignment_top1"] - summary["tuned"]["alignment_top1"]
    return Curve(gains, spent[measured], steps[measured] * np.median(seconds), lost)


def cost_of(curve: Curve, gain: float, what: str) -> float:
    """FLOPs or seconds at which a curve first has the gain, on a straight line between measurements; nan: never."""
    costs, gains = (np.concatenate([[0.0], x]) for x in (getattr(curve, what), curve.gains))
    above = np.flatnonzero(gains >= gain)
    if not len(above):
        return math.nan
    i = above[0]
    part = (gain - gains[i - 1]) / (gains[i] - gains[i - 1]) if i else 0.0
    return float(costs[i - 1] + part * (costs[i] - costs[i - 1])) if i else 0.0


# -------------------------------------------------------------------------------------------------------------- tables
def _tries_table(found: Mapping[str, Found]) -> list[str]:
    lines = ["| method | learning rate | beta | gain | alignment lost |", "|---|---|---|---|---|"]
    for name, some in found.items():
        for row in tries_of(some):
            rate, beta = row["train.learning_rate"], row["loss.beta"]
            lines.append(f"| {name} | {rate:g} | {beta:g} | {row['gain']:+.2f} | {row['alignment_lost']:+.2f} |")
    return lines


def _costs_table(curves: Mapping[str, Sequence[Curve]], judge_flops: float) -> list[str]:
    half = float(np.mean([curve.gains[-1] for curve in curves["SPO"]])) / 2
    head = "| method | gain at the end | alignment lost | half of SPO's gain costs, TFLOP | with its judge | seconds |"
    lines = [f"Half of SPO's final gain is {half:.2f}.", "", head, "|---|---|---|---|---|---|"]
    costs = {}
    for name, some in curves.items():
        flops, seconds = (np.array([cost_of(curve, half, what) for curve in some]) for what in ("flops", "seconds"))
        costs[name] = [flops / 1e12, (flops + judge_flops * (name == "SPO")) / 1e12, seconds]
        cells = [
            _shown(np.array([curve.gains[-1] for curve in some]), "+.2f"),
            _shown(np.array([curve.alignment_lost for curve in some]), "+.3f"),
            *(_shown(values, form) for values, form in zip(costs[name], (".2f", ".2f", ".0f"), strict=True)),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (first, its), (second, others) = costs.items()
    both = min(len(its[0]), len(others[0]))  # a seed has the same noise of evaluation for both
    ratios = [_shown(y[:both] / x[:both], ".2f") for x, y in zip(its, others, strict=True)]
    return [*lines, f"| {second} over {first} | | | {' | '.join(ratios)} |"]


def _shown(values: np.ndarray, form: str) -> str:
    """Mean and interval over the seeds; how many of them have no value is said."""
    reached = values[~np.isnan(values)]
    if not len(reached):
        return "never"
    mean, low, high = over_seeds(reached)
    shown = f"{mean:{form}}" + (f" [{low:{form}}, {high:{form}}]" if len(reached) > 1 else "")
    return shown if len(reached) == len(values) else f"{shown}, {len(values) - len(reached)} of {len(values)} never"


# ------------------------------------------------------------------------------------------------------------- picture
def drawing(curves: Mapping[str, Sequence[Curve]], judge_flops: float) -> str:
    """An SVG of two panels, gain over TFLOP and over seconds; SPO is dashed with its judge's training added."""
    width, height, left, top, gap = 330, 220, 58, 34, 60
    parts = []
    highest = max(float(curve.gains.max()) for some in curves.values() for curve in some) * 1.05
    lowest = min(0.0, *(float(curve.gains.min()) for some in curves.values() for curve in some))
    panels = (("flops", 1e12, "training TFLOP"), ("seconds", 1.0, "training seconds"))
    for panel, (what, unit, label) in enumerate(panels):
        x0 = left + panel * (width + gap)
        extra = judge_flops if what == "flops" else 0.0
        farthest = max(float(getattr(curve, what)[-1]) for some in curves.values() for curve in some) + extra

        def place(cost: float, gain: float, x0: float = x0, farthest: float = farthest) -> str:
            x = x0 + cost / farthest * width
            return f"{x:.1f},{top + (highest - gain) / (highest - lowest) * height:.1f}"

        base = top + height
        parts.append(f'<path d="M{x0} {top}V{base}H{x0 + width}" fill="none" stroke="#888"/>')
        parts.append(f'<text x="{x0 + width / 2}" y="{base + 30}" text-anchor="middle">{label}</text>')
        for share in (0.0, 0.5, 1.0):
            x, value = x0 + share * width, share * farthest / unit
            parts.append(f'<text x="{x}" y="{base + 14}" text-anchor="middle">{value:.3g}</text>')
            y, gain = top + (1 - share) * height, lowest + share * (highest - lowest)
            parts.append(f'<text x="{x0 - 5}" y="{y + 4}" text-anchor="end">{gain:.2f}</text>')
        for (name, some), ink in zip(curves.items(), INKS, strict=True):
            shifts = [(0.0, "")] + ([(extra, ' stroke-dasharray="4 3"')] if name == "SPO" and extra else [])
            for curve in some:
                for shift, dashes in shifts:
                    costs = [shift, *(getattr(curve, what) + shift)]
                    points = " ".join(place(*point) for point in zip(costs, [0.0, *curve.gains], strict=True))
                    parts.append(f'<polyline points="{points}" fill="none" stroke="{ink}"{dashes}/>')
    for i, (name, ink) in enumerate(zip(curves, INKS, strict=True)):
        parts.append(f'<text x="{left + 8 + i * 45}" y="20" fill="{ink}" font-weight="bold">{name}</text>')
    words = "one line a seed; dashed: the training of SPO's judge counted"
    parts.append(f'<text x="{left + 165}" y="20">{words}</text>')
    middle = f"{left - 40} {top + height / 2}"
    label = "gain in the base's standard deviations"
    parts.append(f'<text transform="translate({middle}) rotate(-90)" text-anchor="middle">{label}</text>')
    size = f'viewBox="0 0 {left + 2 * width + gap + 20} {top + height + 44}"'
    title = "<title>Preference gain of SPO and Diffusion-DPO against what training costs</title>"
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    font = 'font-family="sans-serif" font-size="11"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>{title}{paper}{"".join(parts)}</svg>\n'
