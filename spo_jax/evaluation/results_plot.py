"""``results.png`` and ``results.svg``: mean differences with their intervals, a panel a metric, a row a model.

A figure is a list of lines, dots and texts; one function draws it as SVG, another as PNG.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from spo_jax.evaluation.results import Results
from spo_jax.files import atomic_write

Points = Sequence[tuple[float, float]]
INKS = {"ink": "#1a1a1a", "soft": "#c4c4c4", "win": "#0a7d6c", "lose": "#b4501e", "open": "#6a6a6a", "paper": "#ffffff"}
_LABELS, _PANEL, _GAP, _ROW, _MARGIN, _HEAD, _SIZE = 150, 210, 28, 24, 14, 32, 12
_SHARP = 2  # a PNG is drawn so many times larger first, for smooth edges


class Shape(NamedTuple):
    """A line through two points, a dot, or a text at its point; ``ink`` and ``fill`` are keys of ``INKS``."""

    kind: str
    points: Points
    ink: str
    size: float
    text: str = ""
    anchor: str = "start"  # of a text: start, middle, end
    fill: str = ""  # of a dot


class Figure(NamedTuple):
    width: float
    height: float
    shapes: list[Shape]


def draw_differences(results: Results, columns: int = 3) -> Figure | None:
    """Dots and whiskers of all models but the first; None if there is no other.

    A filled dot says that the interval leaves out zero, an open one that it does not. A star marks a metric that
    trained or chose the model.
    """
    models, metrics = results["models"][1:], results["metrics"]
    if not models:
        return None
    rows = math.ceil(len(metrics) / columns)
    columns = math.ceil(len(metrics) / rows)
    height = _HEAD + _ROW * len(models) + 36
    shapes: list[Shape] = []
    for k, (metric, text) in enumerate(metrics.items()):
        entries = [results["results"][model][metric] for model in models]
        left, top = _MARGIN + _LABELS + k % columns * (_PANEL + _GAP), _MARGIN + k // columns * height
        if k % columns == 0:
            for i, model in enumerate(models):
                place = (left - 12, top + _HEAD + _ROW * (i + 0.5) + 4)
                shapes.append(Shape("text", [place], "ink", _SIZE, _shortened(model), "end"))
        shapes += _panel(text["title"], entries, left, top)
    bottom = _MARGIN + rows * height
    level = format(results["statistics"]["level"], ".0%")
    notes = [f"Mean difference from {_shortened(results['models'][0], 60)} and its {level} interval."]
    if any("role" in results["results"][model][metric] for model in models for metric in metrics):
        notes.append("* This metric trained or chose the model.")
    for i, note in enumerate(notes):
        shapes.append(Shape("text", [(_MARGIN, bottom + 10 + 16 * i)], "ink", _SIZE - 1, note))
    width = 2 * _MARGIN + _LABELS + columns * (_PANEL + _GAP)
    return Figure(max(width, 480), bottom + 16 * len(notes) + _MARGIN - 6, shapes)


def _panel(title: str, entries: Sequence[Mapping], left: float, top: float) -> list[Shape]:
    """The differences of one metric, one row a model, with an axis of their own."""
    differences = [entry["against_first"] for entry in entries]
    ends = [end for found in differences for end in (found["interval"] or [found["mean_difference"]])]
    ticks = _ticks(min(0.0, *ends), max(0.0, *ends))
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * _PANEL

    upper, lower = top + _HEAD, top + _HEAD + _ROW * len(entries)
    shapes = [
        Shape("text", [(left, top + 14)], "ink", _SIZE + 1, _shortened(title, 30)),
        Shape("line", [(left, lower), (left + _PANEL, lower)], "soft", 1),
        Shape("line", [(across(0), upper - 6), (across(0), lower)], "open", 1),
    ]
    digits = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
    for tick in ticks:
        shapes.append(Shape("line", [(across(tick), lower), (across(tick), lower + 4)], "soft", 1))
        label = f"{tick:+.{digits}f}" if abs(tick) > 1e-12 else "0"
        shapes.append(Shape("text", [(across(tick), lower + 16)], "ink", _SIZE - 2, label, "middle"))
    for i, (entry, found) in enumerate(zip(entries, differences, strict=True)):
        down, mean, interval = upper + _ROW * (i + 0.5), found["mean_difference"], found["interval"]
        clear = bool(interval) and not interval[0] <= 0 <= interval[1]
        ink = ("win" if mean > 0 else "lose") if clear else "open"
        if interval:
            shapes.append(Shape("line", [(across(interval[0]), down), (across(interval[1]), down)], ink, 1.6))
            for end in interval:
                shapes.append(Shape("line", [(across(end), down - 4), (across(end), down + 4)], ink, 1.6))
        shapes.append(Shape("dot", [(across(mean), down)], ink, 4, fill=ink if clear else "paper"))
        if "role" in entry:
            shapes.append(Shape("text", [(across(mean), down - 4)], "ink", _SIZE + 2, "*", "middle"))
    return shapes


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that hold all values."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * part for part in (0.2, 0.5, 1.0, 2.0, 5.0) if span / (power * part) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _shortened(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def svg(figure: Figure, inks: Mapping[str, str] = INKS) -> str:
    """The figure as SVG; ``inks`` may be CSS variables where a page has them."""
    parts = []
    for shape in figure.shapes:
        (x, y), ink = shape.points[0], inks[shape.ink]
        if shape.kind == "line":
            x2, y2 = shape.points[1]
            parts.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="stroke:{ink}" '
                f'stroke-width="{shape.size}"/>'
            )
        elif shape.kind == "dot":
            fill = f"fill:{inks[shape.fill]};stroke:{ink}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{shape.size}" style="{fill}" stroke-width="1.6"/>')
        else:
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" font-size="{shape.size}" text-anchor="{shape.anchor}" '
                f'style="fill:{ink}">{html.escape(shape.text)}</text>'
            )
    size = (
        f'width="{figure.width:.0f}" height="{figure.height:.0f}" viewBox="0 0 {figure.width:.0f} {figure.height:.0f}"'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif" role="img" '
        f'aria-label="Mean differences with intervals">{"".join(parts)}</svg>'
    )


def write_png(path: str | Path, figure: Figure, scale: int = 3) -> None:
    """Draws the figure on white, ``scale`` pixels for each of its units, 300 to the inch."""
    zoom = scale * _SHARP
    picture = Image.new("RGB", (round(figure.width * zoom), round(figure.height * zoom)), INKS["paper"])
    draw = ImageDraw.Draw(picture)
    for shape in figure.shapes:
        points = [(x * zoom, y * zoom) for x, y in shape.points]
        if shape.kind == "line":
            draw.line(points, INKS[shape.ink], round(shape.size * zoom))
        elif shape.kind == "dot":
            draw.circle(points[0], shape.size * zoom, INKS[shape.fill], INKS[shape.ink], round(1.6 * zoom))
        else:
            font = ImageFont.load_default(shape.size * zoom)
            draw.text(
                points[0], shape.text, INKS[shape.ink], font, {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
            )
    with atomic_write(path) as temporary:
        picture.reduce(_SHARP).save(temporary, "PNG", dpi=(300, 300))
