"""The evidence of a run: ``summary.json`` and a self-contained ``report.html`` that opens offline."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_CURVES = {
    "preference_score_mean": "Preference score of the candidates, mean",
    "loss": "Loss (starts at log 2 = 0.693)",
    "valid_fraction": "Fraction of pairs with a clear preference",
    "win_ratio": "Probability ratio of the better sample",
    "lose_ratio": "Probability ratio of the worse sample",
    "win_clipped": "Fraction of better samples clipped",
    "lose_clipped": "Fraction of worse samples clipped",
    "grad_norm": "Gradient norm",
}
_TIMES = {"seconds_sample": "sampling", "seconds_score": "scoring", "seconds_update": "updating"}
_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --accent: #0a7d6c; }
@media (prefers-color-scheme: dark) { :root { --accent: #4fd1bd; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.lead { opacity: .75; margin-top: .2rem; }
.cards, .pictures, .curves { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.pictures { grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); }
.curves { grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.card { background: var(--soft); border-radius: .6rem; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.6rem; color: var(--accent); }
figure { margin: 0; } figcaption { font-size: .85rem; opacity: .8; }
.pair { display: flex; gap: .5rem; } .pair div { font-size: .75rem; opacity: .9; }
img { width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated; border-radius: .3rem;
  display: block; }
svg { width: 100%; height: auto; } polyline { fill: none; stroke: var(--accent); stroke-width: 1.5; }
svg text { font-size: 10px; fill: currentColor; opacity: .7; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } code { font-size: .9em; }
"""


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Writes the summary as JSON; the file appears complete or not at all."""
    _write(Path(path), json.dumps(summary, indent=2, sort_keys=True) + "\n")


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
    sections = [
        "<h1>Step-aware preference optimization</h1>",
        f'<p class="lead">Seed {_text(summary["seed"])}, {_text(summary["num_prompts"])} held-out prompts, '
        f"{_duration(summary['seconds'])} in all.</p>",
        _headline(summary),
        "<h2>Base and tuned model, same prompts, same noise</h2>",
        f'<div class="pictures">{"".join(_pair(*sample) for sample in samples)}</div>',
        "<h2>Training</h2>",
        f'<div class="curves">{"".join(_curve(name, title, metrics) for name, title in _CURVES.items())}</div>',
        _times(metrics),
        "<h2>Settings</h2>",
        f"<table>{''.join(_settings(summary['config']))}</table>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>SPO report</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    _write(Path(path), page)


def _headline(summary: Mapping[str, Any]) -> str:
    base, tuned, spread = summary["base"], summary["tuned"], summary["base_std"]
    gain = (tuned["colorfulness"] - base["colorfulness"]) / max(spread["colorfulness"], 1e-9)
    cards = (
        (
            f"{summary['win_rate']:.1%}",
            "of the prompts: the tuned picture is the more colourful one (the true preference).",
        ),
        (
            f"{summary['win_rate_preference_score']:.1%}",
            "of the prompts: the preference model scores the tuned picture higher.",
        ),
        (
            f"{base['colorfulness']:.1f} → {tuned['colorfulness']:.1f}",
            f"mean colourfulness, base → tuned: {gain:+.2f} standard deviations of the base model's pictures.",
        ),
        (f"{base['preference_score']:.2f} → {tuned['preference_score']:.2f}", "mean score by the preference model."),
        (
            f"{base['alignment_top1']:.1%} → {tuned['alignment_top1']:.1%}",
            "text alignment: a CLIP finds the picture's own caption among all held-out ones.",
        ),
    )
    body = "".join(f'<div class="card"><b>{_text(value)}</b>{_text(meaning)}</div>' for value, meaning in cards)
    return f'<div class="cards">{body}</div>'


def _pair(prompt: str, base: np.ndarray, tuned: np.ndarray) -> str:
    images = "".join(
        f'<div><img alt="{name}: {_text(prompt)}" src="{_data_uri(image)}">{name}</div>'
        for name, image in (("base", base), ("tuned", tuned))
    )
    return f'<figure><div class="pair">{images}</div><figcaption>{_text(prompt)}</figcaption></figure>'


def _curve(
    name: str, title: str, metrics: Sequence[Mapping[str, float | None]], width: int = 320, height: int = 130
) -> str:
    points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    if not points:
        return ""
    x, y = np.array(points, float).T
    low, high = float(y.min()), float(y.max())
    across = (x - x.min()) / max(np.ptp(x), 1e-12) * (width - 10) + 5
    down = height - 20 - (y - low) / max(high - low, 1e-12) * (height - 40)
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True))
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(title)}">'
        f'<polyline points="{line}"/>'
        f'<text x="5" y="12">{high:.4g}</text><text x="5" y="{height - 6}">{low:.4g}</text>'
        f'<text x="{width - 5}" y="{height - 6}" text-anchor="end">batch {int(x[-1])}</text></svg>'
        f"<figcaption>{_text(title)}: {y[0]:.4g} → {y[-1]:.4g}</figcaption></figure>"
    )


def _times(metrics: Sequence[Mapping[str, float | None]]) -> str:
    totals = {label: sum(row.get(key) or 0.0 for row in metrics) for key, label in _TIMES.items()}
    return "<p>Time: " + ", ".join(f"{label} {_duration(seconds)}" for label, seconds in totals.items()) + ".</p>"


def _settings(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    rows = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            rows += _settings(value, f"{prefix}{key}.")
        else:
            rows.append(f"<tr><td><code>{_text(prefix + key)}</code></td><td><code>{_text(value)}</code></td></tr>")
    return rows


def _data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _duration(seconds: float) -> str:
    return f"{int(seconds // 60)} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.1f} s"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
