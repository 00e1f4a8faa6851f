"""The evidence of a run: ``summary.json`` and a self-contained ``report.html`` that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spo_jax.evaluation.metrics import Described, meaning_of
from spo_jax.files import write_text
from spo_jax.runs.html import captioned, curve, duration, escaped, is_finite, number, page, settings, show_cards, table
from spo_jax.runs.metrics import Row, Summary

# Title, what a good run looks like, and the keys of metrics.jsonl in it.
_CURVES = (
    (
        "Preference score, mean",
        "Of the candidates; noisy, because each batch has other prompts.",
        "preference_score_mean",
    ),
    (
        "Preference score, spread",
        "Its standard deviation; without it there is nothing to choose from.",
        "preference_score_std",
    ),
    ("Loss", "It starts at log 2 = 0.693, where better and worse are equally likely.", "loss"),
    ("Fraction of pairs with a clear preference", "Only these are learned from.", "valid_fraction"),
    ("Probability ratio to the base model", "The better sample should rise above the worse.", "win_ratio lose_ratio"),
    ("Fraction of ratios clipped", "Clipped samples no longer push.", "win_clipped lose_clipped"),
    ("Gradient norm", "It should stay of one size.", "grad_norm"),
)
_TIMES = {"seconds_pool": "sampling", "seconds_score": "scoring", "seconds_update": "updating"}


def write_report(
    path: str | Path,
    *,
    summary: Summary,
    metrics: Mapping[str, Described],
    rows: Sequence[Row],
    samples: Sequence[tuple[str, np.ndarray, np.ndarray]],
) -> None:
    """Writes the report, an HTML file that needs no other file and no network.

    ``rows`` are those of ``metrics.jsonl``; ``samples`` have a prompt, and uint8 images [H, W, 3] of base and tuned
    model from the same noise.
    """
    pictures = "".join(
        captioned([(f"{name}: {prompt}", image, name) for name, image in (("base", base), ("tuned", tuned))], prompt)
        for prompt, base, tuned in samples
    )
    curves = "".join(curve(title, hint, names.split(), rows) for title, hint, names in _CURVES)
    sections = [
        "<h1>Step-aware preference optimization</h1>",
        f'<p class="lead">A text-to-image model before (base) and after (tuned) learning from a preference model, '
        f"compared on {escaped(summary['num_prompts'])} prompts that it was not trained on. "
        f"Seed {escaped(summary['seed'])}, {duration(summary['seconds'])} in all.</p>",
        _headline(summary, metrics),
        "<h2>Base and tuned model, same prompts, same noise</h2>",
        f'<p class="lead">The first {len(samples)} prompts of the file, not a selection.</p>',
        f'<div class="pictures">{pictures}</div>',
        "<h2>Training</h2>",
        f'<p class="lead">One point a batch of prompts, {len(rows)} in all.</p>',
        f'<div class="curves">{curves}</div>',
        "<h2>Time</h2>",
        _times(summary, rows),
        settings(summary["config"]),
    ]
    write_text(Path(path), page("SPO report", sections))


def _headline(summary: Summary, metrics: Mapping[str, Described]) -> str:
    base, tuned, spread, wins = (summary[key] for key in ("base", "tuned", "base_std", "win_rate"))
    model = str(summary["config"].get("model", ""))

    def gain(name: str) -> str:
        before, after, deviation = base[name], tuned[name], spread.get(name)
        if not (deviation and is_finite(before) and is_finite(after)):
            return ""
        return f" That is {(after - before) / deviation:+.2f} standard deviations of the base model's images."

    cards = [
        (
            number(wins[name], ".1%"),
            f"Win rate by {metrics[name].title.lower()}: on so many prompts the tuned image has the higher one.",
        )
        for name in metrics
        if name in wins
    ]
    for name, metric in metrics.items():
        change = f"{number(base[name], metric.form)} → {number(tuned[name], metric.form)}"
        cards.append((change, f"{metric.title}, mean, base → tuned.{gain(name)} {meaning_of(name, metric, model)}"))
    return show_cards(cards)


def _times(summary: Summary, rows: Sequence[Row]) -> str:
    times = {"The whole run, with loading, compiling and measuring": summary["seconds"]}
    if "seconds_training" in summary:
        times["Training, with checkpoints and validation images"] = summary["seconds_training"]
    for key, label in _TIMES.items():
        times[f"of it {label}"] = sum(row.get(key) or 0.0 for row in rows)
    return table((label, duration(value)) for label, value in times.items())
