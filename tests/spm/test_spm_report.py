"""The report of a preference model's training, read as a browser does."""

import re

import numpy as np

from spo_jax.spm.report import ShownPair, write_spm_report


def row(value, gain=None):
    gains = {} if gain is None else {"told_0": {"value": gain, "interval": [gain - 0.02, gain + 0.02]}}
    return {"accuracy": {"scorer": {"value": value, "interval": [value - 0.05, value + 0.05]}}, "gain": gains}


def report(path, step_aware=True, **changes):
    gain = 0.031 if step_aware else None
    summary = {
        "accuracy": {
            "start": {"0": row(0.512), "701": row(0.499)},
            "best": {"0": row(0.744, gain), "701": row(0.655, gain)},
            "last": {"0": row(0.741, gain), "701": row(0.651, gain)},
        },
        "best_step": 40,
        "records": {"used": 960, "unlabelled": 3, "picture_broken": 2, "caption_missing": 0},
        "seconds": 75.0,
        "seed": 0,
        "config": {"num_steps": 60, "train": {"learning_rate": 3e-4}},
    } | changes
    images = np.random.default_rng(0).integers(0, 256, (2, 2, 8, 8, 3), np.uint8)
    pairs = [
        ShownPair("a <fox> & a hound", images, np.array([[1.5, 0.25], [0.5, np.nan]]), np.array([1.0, 0.0])),
        ShownPair("a tie", images, np.zeros((2, 2)), np.array([0.5, 0.5])),
    ]
    metrics = [{"step": s, "loss": 0.7 - s / 100, "accuracy": 0.5, "accuracy_t701": 0.6} for s in (10, 20)]
    write_spm_report(path, summary=summary, metrics=metrics, pairs=pairs)
    return path.read_text(encoding="utf-8")


def test_it_shows_accuracies_pairs_records_and_settings(tmp_path):
    page = report(tmp_path / "report.html")
    for shown in (
        "74.4%",
        "0.655",
        "[0.605, 0.705]",
        "+0.031",
        "1.50",
        "not finite",
        "t = 701",
        "step 40",
        "1 min 15 s",
    ):
        assert shown in page, shown
    assert "a &lt;fox&gt; &amp; a hound" in page and "preferred the left one" in page and "liked both alike" in page
    assert "a picture is none of JPEG, PNG, WEBP" in page and "the caption is empty" not in page
    assert "train.learning_rate" in page
    assert page.count("data:image/png") == 8


def test_it_needs_no_network_and_runs_nothing(tmp_path):
    page = report(tmp_path / "report.html")
    assert not re.search(r"https?:|url\(|@import|<script|src=\"(?!data:)|\son\w+=", page)


def test_a_model_without_the_timestep_has_no_gain(tmp_path):
    assert "gain of knowing t" not in report(tmp_path / "report.html", step_aware=False)
