"""The emoji world's study: its recipes can be used, and its table finds what was put into the runs."""

import csv
import json
import re

import numpy as np
import pytest
import scipy.stats

from configs import tiny
from examples.emoji_world import study, study_table
from spo_jax.errors import UserError
from spo_jax.spo import config as spo_config

CAPTIONS = [f"caption {i}" for i in range(40)]
METHOD = study_table.METHOD


def write_run(folder, config, seed, shift, alignment=1.0):
    """A finished run whose tuned images are more colourful by ``shift`` standard deviations of the base's."""
    generator = np.random.default_rng(seed)
    base = 80 + 30 * generator.standard_normal(len(CAPTIONS))
    tuned = base + base.std() * (shift + 0.1 * generator.standard_normal(len(CAPTIONS)))
    folder.mkdir(parents=True)
    with (folder / "evaluation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "model", "alignment_top1", "colorfulness"])
        for i, caption in enumerate(CAPTIONS):
            writer.writerow([caption, "base", 1.0, base[i]])
            writer.writerow([caption, "tuned", float(i < alignment * len(CAPTIONS)), tuned[i]])
    rows = [{"step": n, "num_pairs": 50.0, "num_updates": 4.0} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"seconds_training": 100.0, "config": config.to_dict()}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def read_tables(workdir):
    """The three tables, each a list of dicts by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", (workdir / "table.md").read_text(encoding="utf-8"), re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def numbers(cell):
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", cell)]


@pytest.fixture
def counted(monkeypatch):
    """FLOPs without tracing programs."""
    flops = {"encode": 1e12, "pool": 2e12, "score": 3e12, "update": 5e12}
    monkeypatch.setattr(study_table, "flops_of", lambda workdir, folders: dict.fromkeys(folders, flops))


def make_study(workdir, shifts):
    for name, (recipe, seed) in study.RUNS.items():
        if recipe in shifts and seed < len(shifts[recipe]):
            config = study.config_of_run(tiny.get_config(), name, workdir)
            write_run(study.folder_of(workdir, name), config, seed, shifts[recipe][seed])
    study.write_table(workdir)


def test_every_run_has_a_folder_and_a_config_of_its_own_that_can_be_used(tmp_path):
    configs = {name: study.config_of_run(tiny.get_config(), name, tmp_path) for name in study.RUNS}
    for config in configs.values():
        spo_config.check(config)
    assert len({str(study.folder_of(tmp_path, name)) for name in study.RUNS}) == len(study.RUNS) == 36
    assert len({config.to_json() for config in configs.values()}) == len(study.RUNS)
    assert next(iter(study.RUNS.values())) == (METHOD, 0), "differences are to it"
    assert all(study.RECIPES[recipe].changes for recipe in study.RECIPES if recipe != METHOD)


def test_the_table_finds_the_differences_that_are_there(tmp_path, counted):
    shifts = {METHOD: [0.9, 1.0, 0.8], "next start: the best": [0.5, 0.59, 0.41], "k = 2": [0.95, 0.9, 0.8]}
    make_study(tmp_path, shifts)
    reached, differs, cost = read_tables(tmp_path)
    assert [row["recipe"] for row in reached] == list(shifts)
    for row in reached:
        mean, low, high = numbers(row["gain in base std"])
        values = np.array(shifts[row["recipe"]])
        half = scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, 2)
        assert row["seeds"] == "3" and mean == pytest.approx(values.mean(), abs=0.03)
        assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.1)
        assert numbers(row["alignment, base"])[0] == 1.0

    best, two = differs
    for row, expected in ((best, -0.4), (two, -0.017)):
        for key in ("gain minus the method's, over seeds", "over captions"):
            mean, low, high = numbers(row[key])
            assert mean == pytest.approx(expected, abs=0.002) and low <= mean <= high
    # Shifts apart, seeds have the same captions and noise here: pairing leaves nothing of their spread.
    assert numbers(best["over captions"])[2] < -0.38 and best["seeds below, above"] == "3, 0"
    assert best["direction"] == "as in the paper" and best["paper: PickScore minus the method's"] == "-3.56"
    assert two["direction"].startswith("open") and numbers(best["alignment minus the method's, over seeds"]) == [0] * 3
    assert numbers(best["wins against the method's images, over captions"])[0] == 0.0
    assert [row["updates"] for row in cost] == ["8"] * 3 and [row["pairs used"] for row in cost] == ["100"] * 3
    assert [row["candidates sampled and scored"] for row in cost] == ["1,024", "1,024", "512"]
    assert [row["training, TFLOP"] for row in cost] == ["52.0"] * 3  # 2 x (1 + 2 + 3) + 8 x 5 TFLOP


def test_a_study_under_way_shows_what_it_has(tmp_path, counted):
    make_study(tmp_path, {})
    make_study(tmp_path, {METHOD: [0.9, 1.0], "k = 8": [0.9]})
    reached, differs, _ = read_tables(tmp_path)
    assert [row["seeds"] for row in reached] == ["2", "1"]
    (eight,) = differs
    assert eight["gain minus the method's, over seeds"] == "+0.000", "of one seed no interval over seeds"
    assert len(numbers(eight["over captions"])) == 3 and eight["direction"].startswith("open")


def test_a_difference_against_the_paper_is_called_so():
    low, high = study_table.Interval(-0.2, -0.3, -0.1), study_table.Interval(0.2, 0.1, 0.3)
    assert study_table.direction(high, 21.0, 21.43) == study_table.direction(low, 21.5, 21.43) == "against the paper"
    assert study_table.direction(low, 21.0, 21.43) == study_table.direction(high, 21.5, 21.43) == "as in the paper"
    assert study_table.direction(low, None, 21.43) == "–"


def test_runs_that_were_measured_on_other_images_are_not_compared(tmp_path, counted):
    make_study(tmp_path, {METHOD: [0.9], "k = 8": [0.9]})
    scores = study.folder_of(tmp_path, "k = 8, seed 0") / "evaluation.csv"
    scores.write_text(scores.read_text().replace("caption 7,", "caption 77,"))
    with pytest.raises(UserError, match="not measured on the same base images"):
        study.write_table(tmp_path)


def test_the_cost_is_counted_from_the_programs_of_a_run(tmp_path):
    name = "the method, seed 0"
    config = study.config_of_run(tiny.get_config(), name, tmp_path)
    write_run(study.folder_of(tmp_path, name), config, 0, 0.9)
    folders = {METHOD: study.folder_of(tmp_path, name)}
    found = study_table.flops_of(tmp_path, folders)[METHOD]
    assert all(found[program] > 0 for program in ("encode", "pool", "score", "update"))
    kept = json.loads((tmp_path / study_table.FLOPS).read_text())
    assert kept == {METHOD: found} == study_table.flops_of(tmp_path, folders)
