"""``report.html`` of an evaluation: all numbers, settings, and images side by side; one file that opens offline.

Images are not inside, because there may be thousands; the page shows those of ``images/`` beside it, 50 comparisons at
a time. Its table and plot also go to ``results.md``, ``results.tex``, ``results.png`` and ``results.svg``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from spo_jax.evaluation.report_script import SCRIPT, STYLE
from spo_jax.evaluation.results import Results, write_results
from spo_jax.evaluation.results_plot import draw_differences, svg, write_png
from spo_jax.evaluation.results_tables import difference, explanation, latex, markdown, win_rate, with_interval
from spo_jax.evaluation.score_table import ScoreTable
from spo_jax.evaluation.statistics import disagreement
from spo_jax.files import saying_where, write_text

_INKS = {name: f"var(--{name})" for name in ("ink", "win", "lose", "open", "paper")} | {"soft": "var(--line)"}


def write_reports(out: str | Path, results: Results, table: ScoreTable) -> None:
    """Writes all that is made of the numbers into the folder ``out``.

    These are ``results.json``, ``results.md``, ``results.tex``, ``report.html``, and with more than one model
    ``results.png`` and ``results.svg``.

    Args:
      out: folder of the evaluation; images lie in its ``images/``, if it has them.
      results: of ``summarise``.
      table: the scores that they are of.
    """
    out = Path(out)
    with saying_where(out):
        write_results(out / "results.json", results)
        write_text(out / "results.md", markdown(results))
        write_text(out / "results.tex", latex(results))
        figure = draw_differences(results)
        if figure:
            write_png(out / "results.png", figure)
            write_text(out / "results.svg", svg(figure) + "\n")
        write_text(out / "report.html", report_page(results, table, images=(out / "images").is_dir()))


def report_page(results: Results, table: ScoreTable, images: bool) -> str:
    """The whole page; ``images`` says whether there are files to show."""
    figure = draw_differences(results)
    models = results["models"]
    compared = f" compared with {models[0]}" if len(models) > 1 else ""
    sections = [
        f"<h1>{escape(', '.join(models[1:] or models))}{escape(compared)}</h1>",
        f'<p class="lead">{escape(explanation(results))}</p>',
        f'<div class="wide">{_numbers(results)}</div>',
        _meanings(results),
        f"<h2>Differences</h2>{svg(figure, _INKS)}" if figure else "",
        _pictures(results),
        f"<h2>Settings</h2>{_settings(results)}",
        f'<script type="application/json" id="data">{_data(results, table, images)}</script>',
        f"<script>{SCRIPT}</script>",
    ]
    title = escape(f"Evaluation of {', '.join(models)}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _numbers(results: Results) -> str:
    """The table of metrics and models."""
    head = "".join(f"<th>{escape(model)}</th>" for model in results["models"])
    rows = []
    for metric, text in results["metrics"].items():
        cells = (_cell(results["results"][model][metric], text["form"]) for model in results["models"])
        rows.append(f"<tr><th>{escape(text['title'])}</th>{''.join(cells)}</tr>")
    return f'<table class="numbers"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _cell(entry: Mapping[str, Any], form: str) -> str:
    """Mean, difference and win rates of a model by a metric; green or orange where an interval leaves out a tie."""
    against = entry.get("against_first")
    lines = [f'<div class="mean">{_number(with_interval(entry["mean"], entry["interval"], form), "")}</div>']
    if "role" in entry:
        lines.append(f'<div class="role">{escape(entry["role"])}</div>')
    if against:
        lines.append(f"<div>{_number(difference(against, form), _kind(against['interval'], 0.0))}</div>")
        for key, of in (("win_rate_of_seed_means", "of seed means"), ("win_rate_of_images", "of images")):
            rate = against[key]
            low, high = rate["wilson"]
            told = f"{rate['won']} won, {rate['tied']} tied, {rate['lost']} lost; Wilson {low:.1%} to {high:.1%}"
            shown = _number(win_rate(rate), _kind(rate["interval"], 0.5), "\u202f%")
            lines.append(f'<div title="{escape(told)}">wins {shown} {of}</div>')
        if len(entry["mean_of_each_seed"]) == 1:  # then both are the same
            lines[-2:] = [lines[-1]]
    return f"<td>{''.join(lines)}</td>"


def _number(text: str, kind: str, unit: str = "") -> str:
    """A number in the colour of its ``kind``, with its interval in smaller letters."""
    number, _, ends = text.partition(" [")
    interval = f' <span class="range">[{escape(ends)}</span>' if ends else ""
    return f'<b class="{kind}">{escape(number)}{unit}</b>{interval}'


def _kind(interval: list[float] | None, tie: float) -> str:
    return "" if not interval or interval[0] <= tie <= interval[1] else "win" if interval[0] > tie else "lose"


def _meanings(results: Results) -> str:
    told = [
        f"<li><b>{escape(text['title'])}</b>: {escape(text['meaning'])}</li>"
        for text in results["metrics"].values()
        if text["meaning"]
    ]
    hint = (
        "Below each mean stand the difference and the win rates against the first model, green where it is better and "
        "orange where it is worse, if the interval leaves out a tie. Counts and Wilson's intervals show when the mouse "
        "rests on a win rate."
    )
    lead = f'<p class="hint">{hint}</p>' if len(results["models"]) > 1 else ""
    return lead + (f'<ul class="hint">{"".join(told)}</ul>' if told else "")


def _pictures(results: Results) -> str:
    """The part that the script fills, with its controls."""
    models, metrics = results["models"], [text["title"] for text in results["metrics"].values()]
    sorts, controls = [], []
    if len(models) > 1:
        options = [(str(i), model) for i, model in enumerate(models)][1:]
        if len(models) > 2:
            controls.append(_select("model", f"Model against {models[0]}", options, options[-1][0]))
        else:
            controls.append(f'<input type="hidden" id="model" value="{options[-1][0]}">')
        if len(metrics) > 1:
            sorts.append(("disagreement", "metrics disagree most"))
        for kind in ("lost", "won"):
            sorts += [(f"{kind} {k}", f"{title}: {kind} most") for k, title in enumerate(metrics)]
    else:
        for kind, told in (("low", "lowest"), ("high", "highest")):
            sorts += [(f"{kind} {k}", f"{title}: {told}") for k, title in enumerate(metrics)]
    controls.append(_select("sort", "Show first", [*sorts, ("order", "prompts in order")], ""))
    if len(models) > 1:
        outcomes = [(word, word) for word in ("any", "won", "tied", "lost")]
        controls += [_select(f"filter{k}", title, outcomes, "any") for k, title in enumerate(metrics)]
    controls.append('<label>Words of the prompt, or #number<input id="search" type="search"></label>')
    same = "Each comparison is of one prompt and seed. "
    disagree = (
        "Metrics disagree most where the difference between the most and the least favourable one is largest, each "
        "divided by its standard deviation over all comparisons. "
    )
    return (
        f'<h2 id="pictures">Images</h2><p class="hint">{same if len(models) > 1 else ""}'
        f"{disagree if len(models) > 1 and len(metrics) > 1 else ''}A click on an image opens its file.</p>"
        f'<div class="bar">{"".join(controls)}</div><div class="pager"></div>'
        '<noscript>The images need JavaScript; their files are in images/.</noscript><div id="cases"></div>'
        '<div class="pager"></div>'
    )


def _select(name: str, label: str, options: list[tuple[str, str]], chosen: str) -> str:
    body = "".join(
        f'<option value="{value}"{" selected" if value == chosen else ""}>{escape(text)}</option>'
        for value, text in options
    )
    return f'<label>{escape(label)}<select id="{name}">{body}</select></label>'


def _settings(results: Results) -> str:
    shown = {"statistics": results["statistics"], **results["settings"]}
    rows = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(str(value))}</code></td></tr>"
        for key, value in _flat(shown)
    )
    return f'<table class="settings">{rows}</table>'


def _flat(level: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in level.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _data(results: Results, table: ScoreTable, images: bool) -> str:
    """What the script shows, as JSON that cannot end its element whatever prompts say."""
    scores = table.scores.astype(np.float64)
    disagreements = [disagreement(scores[i] - scores[0]).round(3).tolist() for i in range(1, len(table.models))]
    digits = {name: _digits(table.scores[:, k]) for k, name in enumerate(table.metrics)}
    data = {
        "models": table.models,
        "metrics": [{"title": results["metrics"][name]["title"], "digits": digits[name]} for name in table.metrics],
        "prompts": table.prompts,
        "seeds": table.seeds,
        "scores": table.scores.astype(str).astype(np.float64).tolist(),  # the shortest decimals
        "disagreement": disagreements,
        "images": images,
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _digits(scores: np.ndarray) -> int:
    """Decimals that show a score's differences: three figures of the scores' spread."""
    spread = float(scores.std())
    return int(np.clip(2 - np.floor(np.log10(spread)), 0, 6)) if spread > 0 else 2
