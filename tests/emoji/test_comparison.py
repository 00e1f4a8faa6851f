"""The emoji world's comparison: its table finds the costs that were put into the runs."""

import json
import re

import numpy as np
import pytest

from examples.emoji_world import comparison, comparison_table
from examples.emoji_world.comparison_table import Curve, Found

SETTING = {"train.learning_rate": 1e-3, "loss.beta": 10.0}


def write_run(folder, gains, every, **row):
    """A finished run of a base model whose images have 80 ± 20, measured each ``every`` steps of one second each."""
    folder.mkdir(parents=True)
    steps = range(1, len(gains) * every + 1)
    rows = [{"step": n, "seconds_update": 1.0, **row} for n in steps]
    for i, gain in enumerate(gains):
        rows[(i + 1) * every - 1]["evaluation/colorfulness"] = 80 + 20 * gain
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    summary = {
        "base": {"colorfulness": 80.0, "alignment_top1": 1.0},
        "tuned": {"colorfulness": 80 + 20 * gains[-1], "alignment_top1": 0.9},
        "base_std": {"colorfulness": 20.0},
        "config": {"train": {"accumulation_steps": 2}},
    }
    (folder / "summary.json").write_text(json.dumps(summary))


def write_comparison(workdir, spo, dpo):
    """Runs with these gains by seed: 2 TFLOP a batch of SPO, 1 a step of the other method."""
    flops = {"spo": {"encode": 0.25e12, "pool": 0.5e12, "score": 0.25e12, "update": 0.5e12}, "dpo": {"update": 0.5e12}}
    found = {}
    for (name, method), runs in zip((("SPO", "spo"), ("Diffusion-DPO", "dpo")), (spo, dpo), strict=True):
        folders = [workdir / f"{method}_{i}" for i in range(3)]
        for folder, gains in zip(folders, runs, strict=False):
            write_run(folder, gains, 5, **({"num_updates": 2.0} if method == "spo" else {}))
        found[name] = Found(method, [SETTING], [workdir / "no_try"], folders, flops[method])
    comparison_table.write(workdir, found, 100e12)


def costs(workdir):
    """The table's last rows: of each method, and their ratio, the numbers of each cell."""
    lines = (workdir / "comparison.md").read_text().splitlines()[-3:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [[[float(x) for x in re.findall(r"[-+]?\d+\.?\d*", cell)] for cell in row[1:]] for row in cells]


def test_half_of_the_gain_costs_what_was_spent_until_there(tmp_path):
    write_comparison(tmp_path, [[0.5, 1.0]] * 3, [[0.25, 1.0], [0.5, 1.0], [0.25, 0.75]])
    spo, dpo, ratio = costs(tmp_path)
    # SPO is at 0.5 after 5 batches of 2 TFLOP; the others after 5 + 5/3, 5, and 7.5 steps of 1.
    assert spo == [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [10.0] * 3, [110.0] * 3, [5.0] * 3]
    each = np.array([20 / 3, 5.0, 7.5])
    assert dpo[2][0] == dpo[3][0] == pytest.approx(each.mean(), abs=0.005)
    assert dpo[2][1] < each.mean() < dpo[2][2]
    assert [cell[0] for cell in ratio[2:]] == pytest.approx([each.mean() / cost for cost in (10, 110, 5)], abs=0.005)
    picture = (tmp_path / "comparison.svg").read_text()
    assert picture.count("<polyline") == 2 * 3 + 2 * 3 + 3  # in two panels, and SPO's with the judge in the first


def test_what_never_gains_as_much_is_said(tmp_path):
    write_comparison(tmp_path, [[0.5, 1.0]] * 2, [[0.1, 0.2], [0.1, 0.6]])
    text = (tmp_path / "comparison.md").read_text()
    assert text.count("1 of 2 never") == 6  # of what it costs, and of the ratios
    write_comparison(tmp_path / "none", [[0.5, 1.0]], [[0.1, 0.2]])
    assert (tmp_path / "none" / "comparison.md").read_text().count("| never") == 6


def test_the_first_measurement_counts_from_the_base_model():
    curve = Curve(np.array([0.8, 0.6]), np.array([4.0, 8.0]), np.array([1.0, 2.0]), 0.0)
    assert comparison_table.cost_of(curve, 0.4, "flops") == pytest.approx(2.0)
    assert comparison_table.cost_of(curve, 0.0, "seconds") == 0.0
    assert np.isnan(comparison_table.cost_of(curve, 0.9, "seconds"))


def test_a_try_that_loses_the_prompts_is_not_chosen(tmp_path):
    name = "SPO"
    gains, lost = [0.3, 0.9, 0.5, 0.1, 0.2, 0.4], [0.0, 0.2, 0.04, 0.0, 0.0, 0.0]
    for number, (gain, less) in enumerate(zip(gains, lost, strict=True)):
        folder = comparison.try_folder(tmp_path, name, number)
        write_run(folder, [gain], 1)
        summary = json.loads((folder / "summary.json").read_text())
        summary["tuned"]["alignment_top1"] = 1.0 - less
        (folder / "summary.json").write_text(json.dumps(summary))
    assert comparison.best_try(tmp_path, name) == 2
