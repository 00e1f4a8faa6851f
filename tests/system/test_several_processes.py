"""Training by several real processes over gloo gives what one process gives."""

import json
import os
import socket
import subprocess

import numpy as np
import pytest

from spo_jax.checkpoints.safetensors_io import read_tensors
from spo_jax.training.metrics import read_metrics
from tests.system.commands import ROOT, command, environment, run

SETTINGS = {"num_batches": 2, "checkpoint__every": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """The run of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone") / "w"
    result = run(command(workdir, **SETTINGS), environment(cache))
    assert result.returncode == 0, result.stderr
    return workdir


def train_together(workdir, cache, count, **changes):
    """Runs the command in so many processes of one device each; returns what they printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", f"--num_processes={count}"]
    started = [
        subprocess.Popen(
            [*command(workdir, **SETTINGS, **changes), *flags, f"--process_id={i}"],
            cwd=ROOT,
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=900) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]


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


def test_two_processes_train_the_adapters_of_one_and_the_first_one_writes(tmp_path, alone, cache):
    first, second = train_together(tmp_path / "w", cache, 2)
    check_equal(tmp_path / "w", alone)
    assert "Report:" in first and "Report:" not in second
    ours, theirs = (json.loads((w / "summary.json").read_text(encoding="utf-8")) for w in (tmp_path / "w", alone))
    assert ours["tuned"]["preference_score"] == pytest.approx(theirs["tuned"]["preference_score"], rel=1e-3)
    assert os.listdir(tmp_path / "w" / "checkpoints") == ["2"]


@pytest.mark.slow
def test_four_processes_that_also_split_the_weights_train_the_adapters_of_one(tmp_path, alone, cache):
    train_together(tmp_path / "w", cache, 4, mesh__data=2, mesh__fsdp=2)
    check_equal(tmp_path / "w", alone)
