"""Benchmarks run: the comparison with PyTorch, whose check is a test of the whole iteration, and the pieces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(name, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--size=tiny", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("rounds", [0, 1])
def test_against_pytorch(tmp_path, rounds):
    output = run("against_pytorch", f"--rounds={rounds}", f"--check={rounds == 0}", f"--folder={tmp_path}")
    result = json.loads(output.splitlines()[-1])
    assert {"size", "dtype", "device", "cores", "versions", "parameters", "pytorch", "ours"} <= set(result)
    assert len(result["pytorch"]) == len(result["ours"]) == rounds
    if rounds == 0:
        assert {"UNet", "scores of a pool", "gradient of the first update"} < set(result["check"])
        # Far below what the command itself allows: the same weights, noise, pairs and adapters in float32.
        assert max(result["check"].values()) < 1e-4
        return
    names = ("sampling", "update", "iteration", "memory", "later_memory")
    assert all(result[f"{name}_ratio"] > 0 for name in names) and result["compile_cold_seconds"] > 0
    theirs, ours = result["pytorch"][0], result["ours"][0]
    assert result["iteration_ratio"] == ours["iteration"] / theirs["iteration"]
    # Trained from log 2 by the same recipe.
    assert theirs["loss"] == pytest.approx(0.693, abs=0.02) and ours["loss"] == pytest.approx(0.693, abs=0.02)
    assert "| update, s |" in output and "compile and trace, cold" in output


def test_pieces(tmp_path):
    output = run("pieces", "--batch=2", "--repeats=1", f"--folder={tmp_path}")
    rows = [line for line in output.splitlines() if line.startswith("| ") and line[2:6] not in ("piec", "---|")]
    assert len(rows) == 13 and all(row.count("|") == 8 for row in rows)
