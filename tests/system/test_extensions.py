"""The examples of ``docs/architecture.md``: a metric, a scorer and an objective, one file and a config line each."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from spo_jax.runs.metrics import read_metrics
from tests.small_pipeline import small_pipeline
from tests.system.commands import ROOT, environment

DIFFS = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("diff", DIFFS)
def test_each_touches_one_file_of_the_package(diff):
    assert len(DIFFS) == 3
    files = re.findall(r"^\+\+\+ b/(\S+)$", diff, re.MULTILINE)
    assert len(files) == 1 and files[0].startswith("spo_jax/") and (ROOT / files[0]).is_file()


def test_with_all_three_a_run_trains_and_reports(tmp_path):
    shutil.copytree(ROOT / "spo_jax", tmp_path / "spo_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for diff in DIFFS:
        subprocess.run(["git", "apply", "--recount", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    changes = {
        "model": small_pipeline(),
        "num_batches": 1,
        "prompts_per_batch": 2,
        "sampling.num_steps": 3,
        "sampling.num_plain_steps": 1,
        "sampling.num_candidates": 2,
        "scorer.kind": "smooth",
        "pairs.threshold": 0.0,
        "loss.kind": "cdpo",
        "train.minibatch_size": 2,
        "evaluation.metrics": "('contrast', 'colorfulness')",
        "evaluation.num_prompts": 2,
        "validation.every": 0,
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    command = [sys.executable, "-m", "spo_jax.main", "--config=configs/tiny.py", "--workdir=run", *flags]
    ran = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    for part in ("base", "tuned", "base_std", "win_rate"):
        assert set(summary[part]) == {"contrast", "colorfulness"}
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["num_pairs"] == 4 and row["grad_norm"] > 0
    assert row["preference_score_mean"] < 0, "minus the size of the edges"
    assert (tmp_path / "run" / "evaluation.csv").read_text().startswith("prompt,model,colorfulness,contrast\n")
    assert "Contrast" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
