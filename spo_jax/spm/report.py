"""The evidence of a preference model's training: a self-contained ``report.html`` that opens offline."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spo_jax.data.records import FAULTS
from spo_jax.evaluation.pair_accuracy import PLAIN, SCORER, TOLD_0
from spo_jax.files import write_text
from spo_jax.runs.html import captioned, curve, duration, escaped, number, page, settings, show_cards, table

_CURVES = (
    ("Loss", "Cross-entropy with the labels; log 2 = 0.693 is a coin's.", "loss"),
    ("Accuracy in training", "On the pairs of the last steps, at random timesteps.", "accuracy"),
    ("Gradient norm", "It should stay of one size.", "grad_norm"),
    ("Learning rate", "Warm-up, then linearly to 0.", "learning_rate"),
    ("Records skipped", "So far, because something was wrong with them.", "records_skipped"),
)


class ShownPair(NamedTuple):
    """One pair: caption, uint8 pictures [T, 2, H, W, 3] as seen at T timesteps, their scores [T, 2], labels [2]."""

    caption: str
    images: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def write_spm_report(
    path: str | Path,
    *,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float | None]],
    pairs: Sequence[ShownPair],
) -> None:
    """Writes the report, an HTML file that needs no other file and no network.

    ``metrics`` are the rows of ``metrics.jsonl``; ``pairs`` some of the validation pairs, as the last model saw them at
    the timesteps of the summary.
    """
    best = summary["accuracy"]["best"]
    cards = [
        (
            f"{number(row['accuracy'][SCORER]['value'], '.1%')}",
            f"Accuracy at t = {timestep}: of so many validation pairs the preferred picture has the higher score.",
        )
        for timestep, row in best.items()
    ]
    meanings = {"used": "used", "unlabelled": "left out: nobody said which picture is better", **FAULTS}
    curves = [curve(title, hint, (name,), metrics) for title, hint, name in _CURVES]
    curves += [
        curve(f"Accuracy at t = {timestep}", "On the validation pairs.", (f"accuracy_t{timestep}",), metrics)
        for timestep in best
    ]
    kinds = itertools.chain("h", itertools.repeat("d"))  # of the cells: <th> in the first row
    accuracies = "".join(
        f"<tr>{''.join(f'<t{kind}>{escaped(cell)}</t{kind}>' for cell in row)}</tr>"
        for kind, row in zip(kinds, accuracy_rows(summary["accuracy"]), strict=False)
    )
    sections = [
        "<h1>Preference model</h1>",
        f'<p class="lead">Which of two pictures people prefer, told from what a diffusion model makes of them at a '
        f"timestep. The best of the measured models is that of step {escaped(summary['best_step'])}. "
        f"Seed {escaped(summary['seed'])}, {duration(summary['seconds'])} in all.</p>",
        show_cards(cards),
        "<h2>Accuracy on the validation pairs</h2>",
        '<p class="lead">With 95 % intervals. Ties are left out. Gains are on the same pairs: over the same model told '
        "t = 0 everywhere, and over another model without the time input, if config.validation.plain names one.</p>",
        f"<table>{accuracies}</table>",
        "<h2>What the model sees</h2>",
        f'<p class="lead">The first {len(pairs)} validation pairs at each timestep, with the scores of the last model. '
        "Both pictures of a pair got the same noise.</p>",
        "".join(_pair(pair, list(best)) for pair in pairs),
        "<h2>Training</h2>",
        f'<div class="curves">{"".join(curves)}</div>',
        "<h2>Records</h2>",
        table((meanings[name], count) for name, count in summary["records"].items() if count or name == "used"),
        settings(summary["config"]),
    ]
    write_text(Path(path), page("Preference model report", sections))


def accuracy_rows(accuracy: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table of ``summary.json``'s accuracies: a head, then a label and a text for each timestep."""

    def row(label: str, entries: Iterable[Mapping[str, Any]], form: str) -> tuple[str, ...]:
        ranges = ([number(end, form) for end in (entry["value"], *entry["interval"])] for entry in entries)
        return label, *(f"{value} [{low}, {high}]" for value, low, high in ranges)

    rows: list[tuple[str, ...]] = [("", *(f"t = {timestep}" for timestep in accuracy["best"]))]
    for model, meaning in (("start", "before training"), ("best", "best"), ("last", "last")):
        measured = list(accuracy[model].values())
        rows.append(row(meaning, (at["accuracy"][SCORER] for at in measured), ".3f"))
        for other, of_what in ((TOLD_0, "gain of knowing t"), (PLAIN, "gain over the plain model")):
            if model != "start" and other in measured[0]["gain"]:
                rows.append(row(f"{meaning}: {of_what}", (at["gain"][other] for at in measured), "+.3f"))
    return rows


def _pair(pair: ShownPair, timesteps: Sequence[str]) -> str:
    if pair.labels[0] == pair.labels[1]:
        wanted = "people liked both alike"
    else:
        wanted = f"people preferred the {'left' if pair.labels[0] > pair.labels[1] else 'right'} one"
    seen = []
    for timestep, images, scores in zip(timesteps, pair.images, pair.scores, strict=True):
        below = (number(float(score), ".2f") for score in scores)
        alt = f"{pair.caption}, t = {timestep}"
        seen.append(captioned(zip((alt, alt), images, below, strict=True), f"t = {timestep}"))
    return f'<p><b>{escaped(pair.caption)}</b>: {wanted}</p><div class="steps">{"".join(seen)}</div>'
