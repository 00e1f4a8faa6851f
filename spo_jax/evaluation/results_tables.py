"""How results are written for people: numbers with intervals, and the tables ``results.md`` and ``results.tex``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from spo_jax.evaluation.results import Results

NONE = "–"
HEADER = ("Metric", "Model", "Mean", "Difference", "Wins of seed means, %", "Wins of images, %")


class Line(NamedTuple):
    """A line of a table, all as text; ``role`` is "" where there is none, comparisons of the first model are "–"."""

    metric: str
    model: str
    mean: str
    difference: str
    win_rate_of_seed_means: str
    win_rate_of_images: str
    role: str


def lines(results: Results) -> Iterator[Line]:
    """A line for each metric and model, by metric."""
    for metric, text in results["metrics"].items():
        for model in results["models"]:
            entry = results["results"][model][metric]
            against = entry.get("against_first")
            yield Line(
                text["title"],
                model,
                with_interval(entry["mean"], entry["interval"], text["form"]),
                difference(against, text["form"]) if against else NONE,
                win_rate(against["win_rate_of_seed_means"]) if against else NONE,
                win_rate(against["win_rate_of_images"]) if against else NONE,
                entry.get("role", ""),
            )


def with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    """A number, and the ends of its interval if it has one."""
    ends = f" [{', '.join(format(end, form) for end in interval)}]" if interval else ""
    return format(value, form) + ends


def difference(against: dict[str, Any], form: str) -> str:
    """A mean difference and its interval, with signs, and digits enough for two of the interval's half width."""
    interval = against["interval"]
    digits = re.fullmatch(r"\.(\d)f", form)
    if digits and interval and interval[1] > interval[0]:
        needed = 1 - math.floor(math.log10((interval[1] - interval[0]) / 2))
        form = f".{min(max(int(digits[1]), needed), 6)}f"
    return with_interval(against["mean_difference"], interval, "+" + form)


def win_rate(rate: dict[str, Any]) -> str:
    """A win rate and its interval of the bootstrap, in percent, without the sign."""
    return with_interval(100 * rate["rate"], [100 * end for end in rate["interval"] or ()], ".1f")


def explanation(results: Results) -> str:
    """What a reader has to know of all the numbers, in a few sentences."""
    statistics, prompts, seeds = results["statistics"], results["prompts"], len(results["seeds"])
    sentences = [f"{prompts} prompt{'s' * (prompts > 1)}, {seeds} seed{'s' * (seeds > 1)} each."]
    if len(results["models"]) > 1:
        sentences.append(
            f"Differences and win rates are against {results['models'][0]}, on the same prompts and seeds; ties count "
            "half."
        )
        sentences.append(
            "Wins of seed means compare each prompt's mean over the seeds, wins of images each image with the one of "
            "the same seed."
            if seeds > 1
            else "With one seed both win rates are the same."
        )
    if prompts > 1:
        sentences.append(
            f"In brackets {statistics['level']:.0%} intervals: {'paired ' if len(results['models']) > 1 else ''}"
            f"bootstrap over prompts, {statistics['resamples']:,} resamples."
        )
    return " ".join(sentences)


def markdown(results: Results) -> str:
    """``results.md``: the table, what it means, and the roles of metrics beside their numbers."""
    rows = [HEADER, ("---", "---", *["---:"] * 4)]
    rows += [
        (line.metric, line.model, f"{line.mean}{f' ({line.role})' if line.role else ''}", *line[3:6])
        for line in lines(results)
    ]
    table = "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows)
    return f"{table}\n\n{explanation(results)}\n"


def _markdown_cell(text: str) -> str:
    return re.sub(r"([|<\\*_`])", r"\\\1", " ".join(text.split()))


def latex(results: Results) -> str:
    """``results.tex``: a table for ``\\usepackage{booktabs}``; a role is a letter, told in the caption."""
    body, notes, above = [], list[str](), ""
    for line in lines(results):
        if line.metric != above:
            body.append(r"\midrule")
        mark = ""
        if line.role:
            notes += [line.role] if line.role not in notes else []
            mark = f"^{{{_letter(notes.index(line.role))}}}"
        metric = "" if line.metric == above else _latex_text(line.metric)
        cells = (metric, _latex_text(line.model), _latex_numbers(line.mean + mark), *map(_latex_numbers, line[3:6]))
        body.append(" & ".join(cells) + r" \\")
        above = line.metric
    caption = " ".join(
        [_latex_text(explanation(results))]
        + [f"$^{{{_letter(i)}}}${_latex_text(note)}" for i, note in enumerate(notes)]
    )
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering\small",
            r"\begin{tabular}{llrrrr}",
            r"\toprule",
            " & ".join(map(_latex_text, HEADER)) + r" \\",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{caption}}}",
            r"\end{table}",
            "",
        ]
    )


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number)


def _latex_numbers(text: str) -> str:
    return "--" if text == NONE else f"${text.replace(' ', chr(92) + ' ')}$"


_LATEX = {
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
