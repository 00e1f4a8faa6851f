"""The evidence of a preference model's training: a self-contained ``report.html`` that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spo_jax.data.records import FAULTS
from spo_jax.evaluation.pair_accuracy import PLAIN, SCORER, TOLD_0
from spo_jax.files import write_text
from spo_jax.runs.html import curve, data_uri, duration, escaped, number, page, settings, show_cards

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
    """Writes the report; it needs no other file and no network.

    Args:
      path: the HTML file.
      summary: what ``summary.json`` holds.
      metrics: the rows of ``metrics.jsonl``.
      pairs: some of the validation pairs, as the last model saw them at the timesteps of the summary.
    """
    best = summary["accuracy"]["best"]
    cards = [
        (
            f"{number(row['accuracy'][SCORER]['value'], '.1%')}",
            f"Accuracy at t = {timestep}: of so many validation pairs the preferred picture has the higher score.",
        )
        for timestep, row in best.items()
    ]
    curves = [curve(title, hint, (name,), metrics) for title, hint, name in _CURVES]
    curves += [
        curve(f"Accuracy at t = {timestep}", "On the validation pairs.", (f"accuracy_t{timestep}",), metrics)
        for timestep in best
    ]
    sections = [
        "<h1>Preference model</h1>",
        f'<p class="lead">Which of two pictures people prefer, told from what a diffusion model makes of them at a '
        f"timestep. The best of the measured models is that of step {escaped(summary['best_step'])}. "
        f"Seed {escaped(summary['seed'])}, {duration(summary['seconds'])} in all.</p>",
        show_cards(cards),
        "<h2>Accuracy on the validation pairs</h2>",
        '<p class="lead">With 95 % intervals. Ties are left out. Gains are on the same pairs: over the same model told '
        "t = 0 everywhere, and over another model without the time input, if config.validation.plain names one.</p>",
        _accuracies(summary["accuracy"]),
        "<h2>What the model sees</h2>",
        f'<p class="lead">The first {len(pairs)} validation pairs at each timestep, with the scores of the last model. '
        "Both pictures of a pair got the same noise.</p>",
        "".join(_pair(pair, list(best)) for pair in pairs),
        "<h2>Training</h2>",
        f'<div class="curves">{"".join(curves)}</div>',
        "<h2>Records</h2>",
        _records(summary["records"]),
        "<h2>Settings</h2>",
        '<p class="lead">Each can be set on the command line, as <code>--config.KEY=VALUE</code>.</p>',
        f'<div class="settings">{settings(summary["config"])}</div>',
    ]
    write_text(Path(path), page("Preference model report", sections))


def _accuracies(accuracy: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f"<th>t = {escaped(timestep)}</th>" for timestep in accuracy["best"])
    rows = []
    for model, meaning in (("start", "before training"), ("best", "best"), ("last", "last")):
        cells = [_with_interval(row["accuracy"][SCORER], ".3f") for row in accuracy[model].values()]
        rows.append((meaning, cells))
        for other, of_what in ((TOLD_0, "gain of knowing t"), (PLAIN, "gain over the plain model")):
            if model != "start" and other in next(iter(accuracy[model].values()))["gain"]:
                cells = [_with_interval(row["gain"][other], "+.3f") for row in accuracy[model].values()]
                rows.append((f"{meaning}: {of_what}", cells))
    body = "".join(f"<tr><td>{name}</td>{''.join(f'<td>{c}</td>' for c in cells)}</tr>" for name, cells in rows)
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _with_interval(entry: Mapping[str, Any], form: str) -> str:
    low, high = entry["interval"]
    return f"{number(entry['value'], form)} <small>[{number(low, form)}, {number(high, form)}]</small>"


def _pair(pair: ShownPair, timesteps: Sequence[str]) -> str:
    if pair.labels[0] == pair.labels[1]:
        wanted = "people liked both alike"
    else:
        wanted = f"people preferred the {'left' if pair.labels[0] > pair.labels[1] else 'right'} one"
    cells = []
    for timestep, images, scores in zip(timesteps, pair.images, pair.scores, strict=True):
        pictures = "".join(
            f'<div><img alt="{escaped(pair.caption)}, t = {escaped(timestep)}" src="{data_uri(image)}">'
            f"{number(float(score), '.2f')}</div>"
            for image, score in zip(images, scores, strict=True)
        )
        cells.append(
            f'<figure><div class="pair">{pictures}</div><figcaption>t = {escaped(timestep)}</figcaption></figure>'
        )
    caption = f"<p><b>{escaped(pair.caption)}</b>: {wanted}</p>"
    return f'{caption}<div class="steps">{"".join(cells)}</div>'


def _records(records: Mapping[str, int]) -> str:
    meanings = {"used": "used", "unlabelled": "left out: nobody said which picture is better", **FAULTS}
    rows = (
        f'<tr><td>{escaped(meanings[name])}</td><td class="n">{count}</td></tr>'
        for name, count in records.items()
        if count or name == "used"
    )
    return f"<table>{''.join(rows)}</table>"
