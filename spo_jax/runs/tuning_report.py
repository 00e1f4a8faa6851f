"""The evidence of a run that has tuned a UNet: a self-contained ``report.html`` that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from spo_jax.evaluation.metrics import Described, meaning_of
from spo_jax.files import write_text
from spo_jax.runs.html import captioned, curve, duration, escaped, is_finite, number, page, settings, show_cards, table
from spo_jax.runs.metrics import Row, Summary
from spo_jax.runs.words import Words


def write_report(
    path: str | Path,
    words: Words,
    *,
    summary: Summary,
    metrics: Mapping[str, Described],
    rows: Sequence[Row],
    samples: Sequence[tuple[str, np.ndarray, np.ndarray]],
) -> None:
    """Writes the report, an HTML file that needs no other file and no network.

    ``words`` are the method's; ``rows`` are those of ``metrics.jsonl``; ``samples`` have a prompt, and uint8 images
    [H, W, 3] of base and tuned model from the same noise.
    """
    pictures = "".join(
        captioned([(f"{name}: {prompt}", image, name) for name, image in (("base", base), ("tuned", tuned))], prompt)
        for prompt, base, tuned in samples
    )
    curves = "".join(curve(title, hint, names.split(), rows) for title, hint, names in words.curves)
    sections = [
        f"<h1>{words.title}</h1>",
        f'<p class="lead">A text-to-image model before (base) and after (tuned) learning from {words.teacher}, '
        f"compared on {escaped(summary['num_prompts'])} prompts that it was not trained on. "
        f"Seed {escaped(summary['seed'])}, {duration(summary['seconds'])} in all.</p>",
        _headline(summary, metrics),
        "<h2>Base and tuned model, same prompts, same noise</h2>",
        f'<p class="lead">The first {len(samples)} prompts of the file, not a selection.</p>',
        f'<div class="pictures">{pictures}</div>',
        "<h2>Training</h2>",
        f'<p class="lead">One point {words.point}, {len(rows)} in all.</p>',
        f'<div class="curves">{curves}</div>',
        "<h2>Time</h2>",
        _times(summary, rows, words.times),
        settings(summary["config"]),
    ]
    write_text(Path(path), page(f"{words.name} report", sections))


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


def _times(summary: Summary, rows: Sequence[Row], labels: Mapping[str, str]) -> str:
    times = {"The whole run, with loading, compiling and measuring": summary["seconds"]}
    if "seconds_training" in summary:
        times["Training, with checkpoints and validation images"] = summary["seconds_training"]
    for key, label in labels.items():
        times[f"of it {label}"] = sum(row.get(key) or 0.0 for row in rows)
    return table((label, duration(value)) for label, value in times.items())
