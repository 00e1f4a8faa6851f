"""Pieces of the reports: one page that opens offline, with cards, curves, pictures and settings."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_LEGEND = {"win": "better sample", "lose": "worse sample (dashed)"}
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
svg { width: 100%; height: auto; display: block; margin-top: .4rem; }
svg line { stroke: var(--line); }
polyline { fill: none; stroke: var(--win); stroke-width: 1.6; stroke-linejoin: round; }
polyline.lose { stroke: var(--lose); stroke-dasharray: 5 3; } .win { color: var(--win); } .lose { color: var(--lose); }
svg text { font-size: 11px; fill: currentColor; opacity: .8; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
code { font-size: .8rem; overflow-wrap: anywhere; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole HTML page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escaped(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def show_cards(cards: Sequence[tuple[str, str]]) -> str:
    """Numbers and what each means."""
    body = "".join(f'<div class="card"><b>{escaped(value)}</b>{escaped(meaning)}</div>' for value, meaning in cards)
    return f'<div class="cards">{body}</div>'


def curve(title: str, hint: str, names: Sequence[str], metrics: Sequence[Mapping[str, float | None]]) -> str:
    """One picture with a line for each of ``names``; a row without a number leaves no point."""
    width, height = 320, 150
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


def settings(config: Mapping[str, Any]) -> str:
    """The section of all settings."""
    return (
        '<h2>Settings</h2><p class="lead">Each can be set on the command line, as <code>--config.KEY=VALUE</code>.</p>'
        f'<div class="settings">{_level(config)}</div>'
    )


def _level(config: Mapping[str, Any], prefix: str = "") -> str:
    """A table of this level's keys with their full names, then those of the levels below."""
    rows = [
        f"<tr><td><code>{escaped(prefix + key)}</code></td><td><code>{escaped(value)}</code></td></tr>"
        for key, value in config.items()
        if not isinstance(value, Mapping)
    ]
    below = [_level(value, f"{prefix}{key}.") for key, value in config.items() if isinstance(value, Mapping)]
    return (f"<table>{''.join(rows)}</table>" if rows else "") + "".join(below)


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Labels, each with a number."""
    cells = (f'<tr><td>{escaped(label)}</td><td class="n">{value}</td></tr>' for label, value in rows)
    return f"<table>{''.join(cells)}</table>"


def captioned(images: Iterable[tuple[str, np.ndarray, str]], caption: str) -> str:
    """Images side by side, uint8 [H, W, 3], each with its alternative text and what stands below it; and a caption."""
    shown = "".join(
        f'<div><img alt="{escaped(alt)}" src="{data_uri(image)}">{below}</div>' for alt, image, below in images
    )
    return f'<figure><div class="pair">{shown}</div><figcaption>{escaped(caption)}</figcaption></figure>'


def data_uri(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, form: str) -> str:
    return format(value, form) if is_finite(value) else "not finite"


def escaped(value: Any) -> str:
    return html.escape(str(value))
