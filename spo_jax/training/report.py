"""The evidence of a run: ``summary.json`` and a self-contained ``report.html`` that opens offline."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spo_jax.files import write_text

# Title, what a good run looks like, and the series in it: (key of metrics.jsonl, name in the legend).
_CURVES = (
    (
        "Preference score, mean",
        "Of the candidates; noisy, because each batch has other prompts.",
        ("preference_score_mean",),
    ),
    (
        "Preference score, spread",
        "Its standard deviation; without it there is nothing to choose from.",
        ("preference_score_std",),
    ),
    ("Loss", "It starts at log 2 = 0.693, where better and worse are equally likely.", ("loss",)),
    ("Fraction of pairs with a clear preference", "Only these are learned from.", ("valid_fraction",)),
    (
        "Probability ratio to the base model",
        "The better sample should rise above the worse.",
        ("win_ratio", "lose_ratio"),
    ),
    ("Fraction of ratios clipped", "Clipped samples no longer push.", ("win_clipped", "lose_clipped")),
    ("Gradient norm", "It should stay of one size.", ("grad_norm",)),
)
_LEGEND = {"win": "better sample", "lose": "worse sample (dashed)"}
_TIMES = {"seconds_sample": "sampling", "seconds_score": "scoring", "seconds_update": "updating"}
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --win: #0a7d6c; --lose: #b4501e; }
@media (prefers-color-scheme: dark) { :root { --win: #4fd1bd; --lose: #f0a070; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1110px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.lead { opacity: .8; margin-top: .2rem; max-width: 46rem; }
.cards, .pictures, .curves { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); }
.pictures { grid-template-columns: repeat(auto-fill, minmax(264px, 1fr)); row-gap: 1.4rem; }
.curves { grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
.settings { columns: 330px; column-gap: 1rem; }
.settings table { width: 100%; border-collapse: separate; border-spacing: 0; break-inside: avoid; margin-bottom: 1rem; }
.settings td:first-child { white-space: nowrap; } .settings td:last-child { width: 99%; }
.card, .curves figure, .settings table { background: var(--soft); border-radius: .6rem; padding: .8rem 1rem; }
.card { font-size: .9rem; }
.card b { display: block; font-size: 1.25rem; color: var(--win); white-space: nowrap; }
figure { margin: 0; } figcaption { font-size: .9rem; }
.hint { display: block; font-size: .8rem; opacity: .8; }
.pair { display: flex; gap: .5rem; } .pair div { font-size: .75rem; opacity: .9; }
img { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated; border-radius: .3rem;
  display: block; }
.steps { display: flex; flex-wrap: wrap; gap: .8rem; } .steps img { width: 98px; height: 98px; }
td small { white-space: nowrap; }
svg { width: 100%; height: auto; display: block; margin-top: .4rem; }
svg line { stroke: var(--line); }
polyline { fill: none; stroke: var(--win); stroke-width: 1.6; stroke-linejoin: round; }
polyline.lose { stroke: var(--lose); stroke-dasharray: 5 3; } .win { color: var(--win); } .lose { color: var(--lose); }
svg text { font-size: 11px; fill: currentColor; opacity: .8; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
code { font-size: .8rem; overflow-wrap: anywhere; }
"""


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Writes the summary as JSON, complete or not at all; a number that is not finite becomes null."""
    write_text(Path(path), json.dumps(_finite(summary), indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_report(
    path: str | Path,
    *,
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float | None]],
    samples: Sequence[tuple[str, np.ndarray, np.ndarray]],
) -> None:
    """Writes the report; it needs no other file and no network.

    Args:
      path: the HTML file.
      summary: what ``summary.json`` holds.
      metrics: the rows of ``metrics.jsonl``.
      samples: prompt, and uint8 pictures [H, W, 3] of base and tuned model from the same noise.
    """
    pictures = "".join(_pair(*sample) for sample in samples)
    curves = "".join(curve(title, hint, names, metrics) for title, hint, names in _CURVES)
    sections = [
        "<h1>Step-aware preference optimization</h1>",
        f'<p class="lead">A text-to-image model before (base) and after (tuned) learning from a preference model, '
        f"compared on {escaped(summary['num_prompts'])} prompts that it was not trained on. "
        f"Seed {escaped(summary['seed'])}, {duration(summary['seconds'])} in all.</p>",
        _headline(summary),
        "<h2>Base and tuned model, same prompts, same noise</h2>",
        f'<p class="lead">The first {len(samples)} prompts of the file, not a selection.</p>',
        f'<div class="pictures">{pictures}</div>',
        "<h2>Training</h2>",
        f'<p class="lead">One point a batch of prompts, {len(metrics)} in all.</p>',
        f'<div class="curves">{curves}</div>',
        "<h2>Time</h2>",
        _times(summary, metrics),
        "<h2>Settings</h2>",
        '<p class="lead">Each can be set on the command line, as <code>--config.KEY=VALUE</code>.</p>',
        f'<div class="settings">{settings(summary["config"])}</div>',
    ]
    write_text(Path(path), page("SPO report", sections))


def page(title: str, sections: Sequence[str]) -> str:
    """The whole HTML page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escaped(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _headline(summary: Mapping[str, Any]) -> str:
    base, tuned, spread = summary["base"], summary["tuned"], summary["base_std"]

    def change(name: str, form: str) -> str:
        return f"{number(base[name], form)} → {number(tuned[name], form)}"

    def gain(name: str) -> str:
        before, after, deviation = base[name], tuned[name], spread.get(name)
        if not (deviation and is_finite(before) and is_finite(after)):
            return ""
        return f" That is {(after - before) / deviation:+.2f} standard deviations of the base model's pictures."

    cards = (
        (
            number(summary["win_rate"], ".1%"),
            "Win rate: on so many prompts the tuned picture is the more colourful one. Colourfulness is the "
            "true preference, which training knows only through the preference model.",
        ),
        (
            number(summary["win_rate_preference_score"], ".1%"),
            "Win rate by score: on so many prompts the preference model scores the tuned picture higher.",
        ),
        (change("colorfulness", ".1f"), f"Colourfulness, mean, base → tuned.{gain('colorfulness')}"),
        (change("preference_score", ".2f"), f"Preference score, mean, base → tuned.{gain('preference_score')}"),
        (
            change("alignment_top1", ".1%"),
            "Text alignment, base → tuned: how often a CLIP finds a picture's own prompt among all of these. "
            "It should hardly drop.",
        ),
    )
    return show_cards(cards)


def show_cards(cards: Sequence[tuple[str, str]]) -> str:
    """Numbers and what each means."""
    body = "".join(f'<div class="card"><b>{escaped(value)}</b>{escaped(meaning)}</div>' for value, meaning in cards)
    return f'<div class="cards">{body}</div>'


def _pair(prompt: str, base: np.ndarray, tuned: np.ndarray) -> str:
    images = "".join(
        f'<div><img alt="{name}: {escaped(prompt)}" src="{data_uri(image)}">{name}</div>'
        for name, image in (("base", base), ("tuned", tuned))
    )
    return f'<figure><div class="pair">{images}</div><figcaption>{escaped(prompt)}</figcaption></figure>'


def curve(
    title: str,
    hint: str,
    names: Sequence[str],
    metrics: Sequence[Mapping[str, float | None]],
    width: int = 320,
    height: int = 150,
) -> str:
    """One picture with a line for each of ``names``; a row without a number leaves no point."""
    found = {name: [(row["step"], row[name]) for row in metrics if is_finite(row.get(name))] for name in names}
    series = {name: np.array(points, float).T for name, points in found.items() if points}
    if not series:
        return ""
    steps, values = np.concatenate(list(series.values()), axis=1)
    first, last, low, high = steps.min(), steps.max(), values.min(), values.max()
    top, bottom = 20, height - 20
    lines, ends = [], []
    for name, (x, y) in series.items():
        kind = name.split("_")[0] if len(names) > 1 else "win"
        across = 4 + (x - first) / max(last - first, 1e-12) * (width - 8)
        down = bottom - 4 - (y - low) / max(high - low, 1e-12) * (bottom - top - 8)
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True)]
        points = points if len(points) > 1 else [points[0], f"{across[0] + 3:.1f},{down[0]:.1f}"]
        lines.append(f'<polyline class="{kind}" points="{" ".join(points)}"/>')
        legend = f'<span class="{kind}">{_LEGEND[kind]}</span> ' if len(names) > 1 else ""
        ends.append(f"{legend}{y[0]:.4g} → {y[-1]:.4g}")
    return (
        f"<figure><figcaption><b>{escaped(title)}</b>"
        f'<span class="hint">{"; ".join(ends)}. {escaped(hint)}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(title)}">'
        f'<line x1="0" y1="{top}" x2="{width}" y2="{top}"/><line x1="0" y1="{bottom}" x2="{width}" y2="{bottom}"/>'
        f'{"".join(lines)}<text x="0" y="{top - 5}">{high:.4g}</text><text x="0" y="{height - 6}">{low:.4g}</text>'
        f'<text x="{width}" y="{height - 6}" text-anchor="end">step {int(first)} to {int(last)}</text></svg></figure>'
    )


def _times(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, float | None]]) -> str:
    times = {"The whole run, with loading, compiling and measuring": summary["seconds"]}
    if "seconds_training" in summary:
        times["Training, with checkpoints and validation pictures"] = summary["seconds_training"]
    for key, label in _TIMES.items():
        times[f"of it {label}"] = sum(row.get(key) or 0.0 for row in metrics)
    rows = (f'<tr><td>{escaped(label)}</td><td class="n">{duration(value)}</td></tr>' for label, value in times.items())
    return f"<table>{''.join(rows)}</table>"


def settings(config: Mapping[str, Any], prefix: str = "") -> str:
    """A table of this level's keys with their full names, then those of the levels below."""
    rows = [
        f"<tr><td><code>{escaped(prefix + key)}</code></td><td><code>{escaped(value)}</code></td></tr>"
        for key, value in config.items()
        if not isinstance(value, Mapping)
    ]
    below = [settings(value, f"{prefix}{key}.") for key, value in config.items() if isinstance(value, Mapping)]
    return (f"<table>{''.join(rows)}</table>" if rows else "") + "".join(below)


def data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: Any, form: str) -> str:
    return format(value, form) if is_finite(value) else "not finite"


def escaped(value: Any) -> str:
    return html.escape(str(value))
