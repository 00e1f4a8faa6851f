"""The report and the summary: complete, readable without network, and safe to open whatever the prompts say."""

import base64
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spo_jax.runs.metrics import write_summary
from spo_jax.runs.tuning_report import write_report
from spo_jax.spo.config import get_config
from spo_jax.spo.words import words_of
from tests.metrics import all_metrics

KEYS = "loss preference_score_mean preference_score_std valid_fraction win_ratio lose_ratio win_clipped lose_clipped"
KEYS += " grad_norm seconds_pool seconds_score seconds_update"
ROWS = [{"step": i, **{key: 0.1 * i + 0.01 * n for n, key in enumerate(KEYS.split())}} for i in (1, 2, 3)]


def make_summary(**changes):
    summary = {
        "base": {"preference_score": 10.0, "colorfulness": 80.0, "alignment_top1": 0.98},
        "tuned": {"preference_score": 12.5, "colorfulness": 100.0, "alignment_top1": 0.965},
        "base_std": {"preference_score": 5.0, "colorfulness": 40.0},
        "win_rate": {"colorfulness": 0.785, "preference_score": 0.845},
        "num_prompts": 200,
        "seconds": 359.7,
        "seconds_training": 300.2,
        "seed": 7,
        "config": {"seed": 7, "train": {"learning_rate": 1e-4, "max_grad_norm": None}},
    }
    return summary | changes


def make_page(tmp_path, summary=None, rows=ROWS, samples=()):
    options = {"metrics": all_metrics(), "rows": rows, "samples": list(samples)}
    write_report(tmp_path / "report.html", words_of(get_config(), 4000), summary=summary or make_summary(), **options)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags, in order, with their attributes; checks that each element is closed where it should be."""

    VOID = ("meta", "img", "line", "polyline")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_headline_numbers_settings_and_times(tmp_path):
    text = " ".join(Page(make_page(tmp_path)).text)
    for number in ("78.5%", "84.5%", "80.0 → 100.0", "10.00 → 12.50", "98.0% → 96.5%", "200 prompts", "Seed 7"):
        assert number in text
    assert text.count("+0.50 standard deviations") == 2  # 20 / 40 and 2.5 / 5
    for setting in ("train.learning_rate", "0.0001", "train.max_grad_norm", "None"):
        assert setting in text
    assert "6 min 0 s" in text and "5 min 0 s" in text  # never "5 min 60 s"


def test_colourfulness_is_the_true_preference_of_the_emoji_world_only(tmp_path):
    for model, is_true in (("emoji:model", True), ("org/name@" + 40 * "0", False), ("runs/emoji:model", False)):
        assert ("true preference" in make_page(tmp_path, make_summary(config={"model": model}))) == is_true


def test_pictures_are_embedded_without_loss(tmp_path):
    base, tuned = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    images = Page(make_page(tmp_path, samples=[("a fox", base, tuned)])).attributes("img")
    assert [image["alt"] for image in images] == ["base: a fox", "tuned: a fox"]
    for image, expected in zip(images, (base, tuned), strict=True):
        head, _, data = image["src"].partition(",")
        assert head == "data:image/png;base64"
        np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(data))), expected)


def test_the_page_needs_nothing_else(tmp_path):
    page = make_page(tmp_path, samples=[("a fox", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8))])
    names = {tag for tag, _ in Page(page).tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "video", "audio"}
    assert not re.search(r"https?:|url\(|@import|src=\"(?!data:)|\son\w+=", page)
    assert make_page(tmp_path) == make_page(tmp_path), "the same numbers give the same bytes"


@given(prompt=st.text(max_size=30), value=st.text(max_size=30))
def test_prompts_and_settings_are_escaped(tmp_path_factory, prompt, value):
    picture = np.zeros((2, 2, 3), np.uint8)
    quoted = [f"<script>{prompt}", f'"><img src=x onerror="{prompt}', prompt.replace("\r", "")]
    quoted = [text.encode("utf-8", "ignore").decode() for text in quoted]
    config = {"prompts": f"<b>{value.encode('utf-8', 'ignore').decode()}</b>"}
    page = Page(
        make_page(
            tmp_path_factory.mktemp("report"),
            make_summary(config=config),
            samples=[(text, picture, picture) for text in quoted],
        )
    )
    assert not page.attributes("script")
    assert len(page.attributes("img")) == 6
    assert all("onerror" not in attributes for attributes in page.attributes("img"))


def test_curves_stay_inside_their_picture(tmp_path):
    page = Page(make_page(tmp_path))
    lines = page.attributes("polyline")
    assert len(lines) == 9  # five alone, two pairs
    assert len(page.attributes("svg")) == 7
    for line in lines:
        points = [tuple(map(float, point.split(","))) for point in line["points"].split()]
        assert len(points) == 3
        assert all(0 <= x <= 320 and 20 <= y <= 130 for x, y in points)
    assert lines[0]["points"].split()[0].startswith("4.0,") and lines[0]["points"].split()[-1].startswith("316.0,")


@pytest.mark.parametrize(
    "rows, lines",
    [
        ([], 0),
        ([{"step": 1, "loss": 0.5}], 1),
        ([{"step": 1, "loss": None}, {"step": 2, "loss": None}], 0),
        ([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": float("inf")}], 1),
        ([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}], 1),
        ([{"step": 1, "win_ratio": 1.0}, {"step": 2, "win_ratio": 1.1}], 1),
    ],
)
def test_missing_and_constant_metrics(tmp_path, rows, lines):
    page = make_page(tmp_path, rows=rows)
    assert len(Page(page).attributes("polyline")) == lines
    assert not re.search(r'points="[^"]*(nan|inf)', page)


def test_numbers_that_are_not_finite(tmp_path):
    nan = float("nan")
    summary = make_summary(
        tuned={"preference_score": nan, "colorfulness": None, "alignment_top1": 0.5}, base_std={"colorfulness": 0.0}
    )
    assert "not finite" in make_page(tmp_path, summary)
    write_summary(tmp_path / "summary.json", summary)
    recorded = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert recorded["tuned"] == {"preference_score": None, "colorfulness": None, "alignment_top1": 0.5}


def test_summary_appears_complete_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "summary.json"
    write_summary(path, make_summary())
    assert json.loads(path.read_text(encoding="utf-8")) == make_summary()

    def fail(source, target):
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed here"):
        write_summary(path, make_summary(seed=8))
    assert json.loads(path.read_text(encoding="utf-8"))["seed"] == 7
