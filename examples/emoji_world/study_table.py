"""The table of the emoji world's study: what each recipe reached, how it differs from the method, and what it cost.

Two intervals of 95 %, which answer different questions:

- **over seeds**: Student's t of one number a seed, the mean over all held-out captions. It is about another training
  and other noise of evaluation, on these captions; three seeds make it wide (2.48 standard deviations to each side).
- **over captions**: percentiles of 10,000 bootstrap samples of captions, whose values are averaged over the seeds
  first. It is about other captions, with these trained models, and says nothing of another training.

Differences are paired in both: runs of one seed have the same prompts in the same order, the same first adapters, and
in evaluation the same captions and noise, so that base images are the same.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

from configs import recorded
from spo_jax.errors import UserError
from spo_jax.evaluation.statistics import LEVEL, bootstrap_means, image_wins, percentile_interval, seed_means
from spo_jax.files import write_text
from spo_jax.formats.json_files import read_json
from spo_jax.planning.planner import make_plan
from spo_jax.planning.targets import parse_target
from spo_jax.runs.metrics import METRICS_FILE, read_metrics

METHOD = "the method"
SUMMARY = "summary.json"
FLOPS = "flops.json"  # of each program, by recipe
TRUTH, ALIGNMENT = "colorfulness", "alignment_top1"


class Run(NamedTuple):
    """Captions; scores of the base and the tuned model's images by metric, float64 [captions]; and what it took."""

    captions: list[str]
    base: dict[str, np.ndarray]
    tuned: dict[str, np.ndarray]
    pairs: int  # valid ones, learned from
    updates: int
    batches: int
    seconds: float


class Interval(NamedTuple):
    """A mean with its interval; nan where there is none, as of one seed."""

    mean: float
    low: float
    high: float


def read_run(folder: Path) -> Run:
    """A finished run."""
    captions: list[str] = []
    scores: dict[str, dict[str, list[float]]] = {"base": {}, "tuned": {}}
    with (folder / "evaluation.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            model = row.pop("model")
            captions += [row["prompt"]] * (model == "base")
            for name in (TRUTH, ALIGNMENT):
                scores[model].setdefault(name, []).append(float(row[name]))
    base, tuned = ({name: np.array(x) for name, x in scores[model].items()} for model in ("base", "tuned"))
    rows = read_metrics(folder / METRICS_FILE)
    pairs, updates = (int(sum(row[name] for row in rows)) for name in ("num_pairs", "num_updates"))
    return Run(captions, base, tuned, pairs, updates, len(rows), read_json(folder / SUMMARY)["seconds_training"])


# ---------------------------------------------------------------------------------------------------------- statistics
def over_seeds(values: np.ndarray) -> Interval:
    """Student's t interval of the mean of one number a seed, [seeds]."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    half = scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return Interval(mean, float(mean - half), float(mean + half))


def over_captions(values: np.ndarray) -> Interval:
    """Bootstrap interval of the mean of values [captions, seeds]: captions are drawn, seeds stay."""
    means = seed_means(values)
    return Interval(float(means.mean()), *map(float, percentile_interval(bootstrap_means(means))))


def gains(runs: Sequence[Run]) -> np.ndarray:
    """Gain of each image in the true preference, [captions, seeds], in standard deviations of the base's images."""
    return np.stack([(run.tuned[TRUTH] - run.base[TRUTH]) / run.base[TRUTH].std() for run in runs], -1)


def column(runs: Sequence[Run], model: str, metric: str) -> np.ndarray:
    """Scores of the images of a model, "base" or "tuned", [captions, seeds]."""
    return np.stack([getattr(run, model)[metric] for run in runs], -1)


def direction(found: Interval, paper: float | None, of_method: float | None) -> str:
    """Whether a difference has the paper's sign, by its interval."""
    if paper is None or of_method is None:
        return "–"
    if not (found.low > 0 or found.high < 0):
        return "open: the interval holds 0"
    return "as in the paper" if (found.mean > 0) == (paper > of_method) else "against the paper"


# -------------------------------------------------------------------------------------------------------------- tables
def results(runs: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """What each recipe reached; intervals over seeds."""
    rows = [["recipe", "seeds", "gain in base std", "win rate against the base", "alignment, base", "tuned"]]
    for name, some in runs.items():
        wins = image_wins(column(some, "tuned", TRUTH).T, column(some, "base", TRUTH).T)  # [seeds], over captions
        alignment = [column(some, model, ALIGNMENT).mean(0) for model in ("base", "tuned")]
        cells = [over_seeds(gains(some).mean(0)), *(_cut(over_seeds(x)) for x in (wins, *alignment))]
        rows.append([name, str(len(some)), *map(_shown, cells)])
    return rows


def differences(runs: Mapping[str, Mapping[int, Run]], paper: Mapping[str, float | None]) -> list[list[str]]:
    """How each recipe differs from the method, seed by seed; ``runs`` by recipe and number of the seed."""
    rows = [
        [
            *("recipe", "gain minus the method's, over seeds", "over captions", "seeds below, above"),
            *("wins against the method's images, over captions", "alignment minus the method's, over seeds"),
            *("paper: PickScore minus the method's", "direction"),
        ]
    ]
    for name, some in runs.items():
        if name == METHOD or not (common := sorted(some.keys() & runs.get(METHOD, {}).keys())):
            continue
        ours, method = ([of[seed] for seed in common] for of in (some, runs[METHOD]))
        _check_paired(name, ours, method)
        gain = gains(ours) - gains(method)
        seeds = gain.mean(0)
        wins = image_wins(column(ours, "tuned", TRUTH), column(method, "tuned", TRUTH))
        alignment = (column(ours, "tuned", ALIGNMENT) - column(method, "tuned", ALIGNMENT)).mean(0)
        its, of_method = paper.get(name), paper.get(METHOD)
        rows.append(
            [
                name,
                _shown(over_seeds(seeds), signed=True),
                _shown(over_captions(gain), signed=True),
                f"{(seeds < 0).sum()}, {(seeds > 0).sum()}",
                _shown(over_captions(wins[:, None])),
                _shown(over_seeds(alignment), signed=True),
                "–" if its is None or of_method is None else f"{its - of_method:+.2f}",
                direction(over_seeds(seeds), its, of_method),
            ]
        )
    return rows


def costs(
    runs: Mapping[str, Sequence[Run]], flops: Mapping[str, Mapping[str, float]], per_batch: Mapping[str, int]
) -> list[list[str]]:
    """What a run of each recipe took, means over the seeds.

    Args:
      runs: by recipe.
      flops: of each program, by recipe.
      per_batch: candidates of a batch of prompts, by recipe.
    """
    rows = [["recipe", "candidates sampled and scored", "pairs used", "updates", "training, TFLOP", "seconds"]]
    for name, some in runs.items():
        of, updates = flops[name], float(np.mean([run.updates for run in some]))
        batches = some[0].batches
        work = batches * (of["encode"] + of["pool"] + of["score"]) + updates * of["update"]
        mean = {key: float(np.mean([getattr(run, key) for run in some])) for key in ("pairs", "seconds")}
        counts = [batches * per_batch[name], mean["pairs"], updates]
        rows.append([name, *(f"{x:,.0f}" for x in counts), f"{work / 1e12:.1f}", f"{mean['seconds']:,.0f}"])
    return rows


def _check_paired(name: str, ours: Sequence[Run], method: Sequence[Run]) -> None:
    for a, b in zip(ours, method, strict=True):
        if a.captions != b.captions or not np.allclose(a.base[TRUTH], b.base[TRUTH], rtol=1e-3, atol=0.1):
            raise UserError(f"{name!r} and {METHOD!r} were not measured on the same base images; make them anew.")


def _cut(interval: Interval) -> Interval:
    """Of a rate: its interval ends at 0 and 1."""
    return Interval(interval.mean, *(float(np.clip(x, 0.0, 1.0)) for x in interval[1:]))


def _shown(interval: Interval, *, signed: bool = False) -> str:
    number = "{:+.3f}" if signed else "{:.3f}"
    mean = number.format(interval.mean)
    return mean if math.isnan(interval.low) else f"{mean} [{', '.join(map(number.format, interval[1:]))}]"


# ---------------------------------------------------------------------------------------------------------------- files
def flops_of(workdir: Path, folders: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """FLOPs of each program, counted from the programs of a run of each recipe; kept in ``flops.json``."""
    path = workdir / FLOPS
    known: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, folder in folders.items():
        if name not in known:
            plan = make_plan(recorded.get_config(str(folder)), parse_target("cpu"), exact=False)
            known[name] = {need.program: need.flops for need in plan.needs}
    write_text(path, json.dumps(known, indent=2) + "\n")
    return known


def candidates_of(folder: Path) -> int:
    """The candidates of a batch of prompts."""
    config = read_json(folder / SUMMARY)["config"]
    sampling = config["sampling"]
    steps = sampling["num_steps"] - sampling["num_plain_steps"]
    return config["prompts_per_batch"] * steps * sampling["num_candidates"]


def write(workdir: Path, folders: Mapping[str, Sequence[Path]], paper: Mapping[str, float | None]) -> None:
    """Writes ``table.md`` from the runs that are finished.

    Args:
      workdir: gets it.
      folders: of the runs of each recipe, one for each seed, finished or not.
      paper: PickScores of the recipes, None of one that the paper does not have.
    """
    there = {
        name: {i: folder for i, folder in enumerate(some) if (folder / SUMMARY).is_file()}
        for name, some in folders.items()
    }
    runs = {name: {i: read_run(folder) for i, folder in some.items()} for name, some in there.items() if some}
    lists = {name: list(some.values()) for name, some in runs.items()}
    first = {name: next(iter(there[name].values())) for name in runs}
    per_batch = {name: candidates_of(folder) for name, folder in first.items()}
    tables = [results(lists), differences(runs, paper), costs(lists, flops_of(workdir, first), per_batch)]
    captions = len(next(iter(lists.values()))[0].captions) if lists else 0
    text = f"{captions} held-out captions.\n\n" + "\n\n".join(map(_markdown, tables)) + "\n"
    write_text(workdir / "table.md", text)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
