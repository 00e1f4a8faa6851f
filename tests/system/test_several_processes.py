"""Training by several real processes over gloo gives what one process gives."""

import json
import os
import sys

import numpy as np
import pytest

from spo_jax.data.builder import write_split
from spo_jax.formats.safetensors_io import read_tensors
from spo_jax.runs.metrics import read_metrics
from tests.preference_data import DAMAGE, damage, record
from tests.small_pipeline import small_pipeline
from tests.system.commands import command, environment, run
from tests.system.together import run_together


def train_command(workdir, **changes):
    """Two batches, with the small UNet."""
    return command(workdir, num_batches=2, checkpoint__every=2, model=small_pipeline(), **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "w"
    result = run(train_command(workdir), environment())
    assert result.returncode == 0, result.stderr
    return workdir


def check_equal(workdir, alone):
    ours, theirs = (read_tensors(w / "pytorch_lora_weights.safetensors") for w in (workdir, alone))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=0, atol=1e-5, err_msg=key)
    assert any(np.abs(value).max() > 1e-5 for key, value in theirs.items() if "lora_B" in key), "they have learned"
    rows, expected = (read_metrics(w / "metrics.jsonl") for w in (workdir, alone))
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2]
    for row, wanted in zip(rows, expected, strict=True):
        assert row["num_pairs"] == wanted["num_pairs"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_two_processes_train_the_adapters_of_one_and_the_first_one_writes(tmp_path, alone):
    first, second = run_together(train_command(tmp_path / "w"), environment(), 2)
    check_equal(tmp_path / "w", alone)
    assert "Report:" in first and "Report:" not in second
    ours, theirs = (json.loads((w / "summary.json").read_text(encoding="utf-8")) for w in (tmp_path / "w", alone))
    assert ours["tuned"]["preference_score"] == pytest.approx(theirs["tuned"]["preference_score"], rel=1e-3)
    assert os.listdir(tmp_path / "w" / "checkpoints") == ["2"]


@pytest.mark.slow
def test_four_processes_that_also_split_the_weights_train_the_adapters_of_one(tmp_path, alone):
    arguments = train_command(tmp_path / "w", mesh__data=2, mesh__fsdp=2)
    run_together(arguments, environment(), 4)
    check_equal(tmp_path / "w", alone)


# -------------------------------------------------------------------------------------------------- preference model
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Every fifth record of both splits is damaged, every third one a tie."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    for split, first in (("train", 0), ("validation", 1000)):
        records = [record(first + i) for i in range(30)]
        for i in range(0, 30, 5):
            records[i] = damage(records[i], list(DAMAGE)[i // 5])
        write_split(folder, split, records)
    return folder


def test_two_processes_evaluate_the_pairs_of_one(data, tmp_path):
    """The first usable pairs of all processes together; unusable records are counted in all of them."""
    results = []
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        arguments = [
            sys.executable,
            "-m",
            "spo_jax.pair_accuracy",
            f"--pairs={data}@validation",
            f"--model={small_pipeline()}",
        ]
        arguments += ["--scorer=emoji:model/scorer", "--timesteps=501", "--num_pairs=13", "--batch_size=4"]
        outputs = run_together([*arguments, "--num_workers=0", f"--out={out}"], environment(), count)
        assert ["pairwise accuracy" in output for output in outputs] == [True] + [False] * (count - 1)
        results.append(json.loads(out.read_text(encoding="utf-8")))
    alone, together = results
    assert together == alone
    assert alone["num_pairs"] + alone["num_ties"] == 13 and sum(alone["skipped"].values()) == 4


@pytest.mark.slow
def test_two_processes_train_the_preference_model_of_one(data, tmp_path):
    changes = {"num_steps": 4, "train.batch_size": 8, "train.warmup_steps": 1, "train.ema_decay": 0.5, "log_every": 2}
    changes |= {"checkpoint.every": 2, "validation.every": 4, "validation.num_pairs": 13, "validation.batch_size": 4}
    changes |= {"validation.timesteps": "(0, 701)", "data.num_workers": 1, "model": small_pipeline()}
    changes |= {"data.train": f"{data}@train", "data.validation": f"{data}@validation"}
    rows, summaries = [], []
    for count in (1, 2):
        workdir = tmp_path / str(count)
        arguments = [sys.executable, "-m", "spo_jax.main", "--config=configs/spm_tiny.py", f"--workdir={workdir}"]
        run_together([*arguments, *(f"--config.{key}={x}" for key, x in changes.items())], environment(), count)
        rows.append(read_metrics(workdir / "metrics.jsonl"))
        summaries.append(json.loads((workdir / "summary.json").read_text(encoding="utf-8")))
    alone, together = rows
    assert [row["step"] for row in alone] == [2, 4]
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if "seconds" not in key:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4 if key == "grad_norm" else 1e-5), key
    alone, together = summaries
    assert together["records"] == alone["records"] and together["best_step"] == alone["best_step"]
    assert together["accuracy"] == alone["accuracy"]
