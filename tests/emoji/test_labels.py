"""How many labels buy how much: which pairs are labelled, by whom, and what the table shows."""

import json

import numpy as np
import pytest

from configs import dpo_tiny
from examples.emoji_world import labels
from examples.emoji_world.labels import RUNS, Run, folder_of, labelled, write_table
from spo_jax.dpo import config as dpo_config


@pytest.fixture
def records(monkeypatch):
    """Three pairs of each of twenty captions, of whose voters a half, all and none prefer the first image."""
    made = [{"caption": f"c{i // 3}".encode(), "label_0": (0.5, 1.0, 0.0)[i % 3], "number": i} for i in range(60)]
    monkeypatch.setattr(labels, "open_pairs", lambda name: made)
    return made


@pytest.mark.parametrize("number", [5, 20, 45, 60])
def test_a_pair_is_labelled_once_by_one_person_and_captions_come_again_only_when_all_were_there(records, number):
    found = list(labelled(number, seed=3))
    assert len({record["number"] for record in found}) == len(found) == number
    assert len({record["caption"] for record in found}) == min(number, 20)
    for record in found:
        assert record["label_0"] in (0.0, 1.0) and record["label_0"] + record["label_1"] == 1
        voters = records[record["number"]]["label_0"]
        assert voters == 0.5 or record["label_0"] == voters
    assert found == list(labelled(number, seed=3)) != list(labelled(number, seed=4))


def test_every_run_has_a_folder_and_a_config_of_its_own_that_can_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "pairs_of", lambda workdir, number, seed: f"{workdir}/{number}_{seed}@train")
    configs = [labels.config_of(dpo_tiny.get_config(), tmp_path, run) for run in RUNS]
    for config in configs:
        dpo_config.check(config)
    assert len({folder_of(tmp_path, run) for run in RUNS}) == len({config.to_json() for config in configs}) == 16


def test_the_table_has_what_the_runs_have_found(tmp_path):
    for seed, gain in ((0, 0.8), (1, 0.6)):
        folder = folder_of(tmp_path, Run(60, 1e-3, seed))
        folder.mkdir()
        summary = {
            "base": {"colorfulness": 80.0, "alignment_top1": 1.0},
            "tuned": {"colorfulness": 80 + 20 * gain, "alignment_top1": 0.9},
            "base_std": {"colorfulness": 20.0},
            "win_rate": {"colorfulness": 0.75},
            "held_out_accuracy": {"90": {"accuracy": 0.5}, "200": {"accuracy": 0.625}},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    write_table(tmp_path)
    _, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert cells[:3] == ["60", "0.001", "2"] and cells[3] == "0.700 (0.600 to 0.800)"
    found = [float(cell.split()[0]) for cell in cells[4:]]
    np.testing.assert_allclose(found, [0.75, 0.1, 0.625])
