"""``results.json``: what all tables and reports are written from, made of a table of scores and the settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spo_jax.errors import UserError
from spo_jax.evaluation.metrics import Described
from spo_jax.evaluation.score_table import ScoreTable
from spo_jax.evaluation.statistics import (
    LEVEL,
    RESAMPLES,
    Counts,
    bootstrap_means,
    count_images,
    count_prompts,
    image_wins,
    percentile_interval,
    prompt_wins,
    seed_means,
    standard_error,
    wilson_interval,
)
from spo_jax.files import saying_where, write_text

Results = dict[str, Any]  # what JSON can hold, see ``summarise``
Roles = Mapping[tuple[str, str], str]  # (model, metric) -> a sentence


class MetricText(NamedTuple):
    """See ``ImageMetric``, for a metric that another program computed."""

    title: str
    meaning: str = ""
    form: str = ".3f"
    compares: bool = True


def summarise(
    table: ScoreTable,
    settings: Mapping[str, Any],
    *,
    metrics: Mapping[str, Described] | None = None,
    roles: Roles | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Results:
    """All numbers of an evaluation.

    Args:
      table: scores; the first model is what the others are compared with.
      settings: stored as they are, nested as the caller likes: how the images were made, hashes of weights and prompts,
        each metric's settings.
      metrics: titles, meanings and forms of numbers by name; a metric that is not in it is shown by its name.
      roles: where a metric trained or chose a model, a sentence that every table shows beside the number.
      resamples: of the bootstrap.
      seed: of the bootstrap.
      level: of all intervals.

    Returns:
      ``prompts`` and ``seeds``, ``models`` and ``metrics``, ``statistics`` (how intervals were made), ``settings``, and
      ``results``: by model and metric ``mean``, ``interval``, ``median`` (of the seed means over prompts),
      ``standard_error`` (of the mean, over prompts), ``mean_of_each_seed``, perhaps ``role``, and except for the first
      model ``against_first``: ``mean_difference``, ``interval``, ``median_difference``, ``standard_error``,
      ``win_rate_of_seed_means`` and ``win_rate_of_images``. A win rate has ``rate``, ``interval`` (bootstrap),
      ``wilson`` (with the number of prompts, also that of images, because images of one prompt are not independent),
      ``won``, ``tied`` and ``lost``. Intervals and standard errors of one prompt are None.

    Raises:
      UserError: a role is of a model or metric that is not in the table.
    """
    roles = roles or {}
    for model, metric in roles:
        if model not in table.models or metric not in table.metrics:
            raise UserError(
                f"A role is given to {metric} of model {model}, but the models are {', '.join(table.models)} and the "
                f"metrics {', '.join(table.metrics)}."
            )
    intervals = _intervals(table, resamples, seed, level)
    results: dict[str, dict[str, Any]] = {}
    for i, model in enumerate(table.models):
        results[model] = {}
        for j, metric in enumerate(table.metrics):
            entry = _of_one_model(table.scores[i, j], intervals[0][i, j])
            if (model, metric) in roles:
                entry["role"] = roles[model, metric]
            if i:
                found = [part[i, j] for part in intervals[1:]]
                entry["against_first"] = _against(table.scores[i, j], table.scores[0, j], found, level)
            results[model][metric] = entry
    return {
        "prompts": len(table.prompts),
        "seeds": list(table.seeds),
        "models": list(table.models),
        "metrics": {name: _text(name, metrics or {}) for name in table.metrics},
        "statistics": {
            "method": "paired bootstrap over prompts, percentiles; seeds are averaged inside a prompt; ties count half",
            "resamples": resamples,
            "seed": seed,
            "level": level,
        },
        "settings": _plain(settings),
        "results": results,
    }


def write_results(path: str | Path, results: Results) -> None:
    """Writes ``results.json``, see ``summarise``."""
    with saying_where(path):
        write_text(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_results(path: str | Path) -> Results:
    """Reads what ``write_results`` has written.

    Raises:
      UserError: it is not there or is something else.
    """
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        if not {"results", "models", "metrics", "statistics"} <= set(results):
            raise ValueError("it lacks results, models, metrics or statistics")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read as results of an evaluation ({error}).") from error
    return results


def _intervals(table: ScoreTable, resamples: int, seed: int, level: float) -> list[np.ndarray]:
    """Intervals [models, metrics, 2] of means, mean differences, and both win rates, from the same draws of prompts."""
    first = table.scores[:1]
    means = seed_means(table.scores)
    values = np.stack([means, means - means[:1], prompt_wins(table.scores, first), image_wins(table.scores, first)])
    return list(percentile_interval(bootstrap_means(values, resamples=resamples, seed=seed), level))


def _of_one_model(scores: np.ndarray, interval: np.ndarray) -> dict[str, Any]:
    means = seed_means(scores)
    return {
        "mean": float(means.mean()),
        "interval": _pair(interval, len(means)),
        "median": float(np.median(means)),
        "standard_error": standard_error(means),
        "mean_of_each_seed": [float(mean) for mean in scores.astype(np.float64).mean(0)],
    }


def _against(scores: np.ndarray, first: np.ndarray, intervals: list[np.ndarray], level: float) -> dict[str, Any]:
    differences = seed_means(scores) - seed_means(first)
    return {
        "mean_difference": float(differences.mean()),
        "interval": _pair(intervals[0], len(differences)),
        "median_difference": float(np.median(differences)),
        "standard_error": standard_error(differences),
        "win_rate_of_seed_means": _win_rate(
            prompt_wins(scores, first), count_prompts(scores, first), intervals[1], level
        ),
        "win_rate_of_images": _win_rate(image_wins(scores, first), count_images(scores, first), intervals[2], level),
    }


def _win_rate(wins: np.ndarray, counts: Counts, interval: np.ndarray, level: float) -> dict[str, Any]:
    return {
        "rate": float(wins.mean()),
        "interval": _pair(interval, len(wins)),
        "wilson": list(wilson_interval(float(wins.sum()), len(wins), level)),
        **counts._asdict(),
    }


def _pair(interval: np.ndarray, prompts: int) -> list[float] | None:
    return [float(end) for end in interval] if prompts > 1 else None


def _text(name: str, metrics: Mapping[str, Described]) -> dict[str, str]:
    text = metrics.get(name) or MetricText(name)
    return {"title": text.title, "meaning": text.meaning, "form": text.form}


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy's numbers and arrays as Python's, anything else that it cannot hold as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
