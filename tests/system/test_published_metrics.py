"""A training run reports metrics that see finished images, draws their curves, and tells what it could not load."""

import csv
import json

from spo_jax.runs.metrics import read_metrics
from tests.system.commands import command, environment, run


def test_a_run_reports_them_and_tells_what_is_left_out(tmp_path):
    workdir = tmp_path / "w"
    metrics = "('preference_score','clip=emoji:model/clip','pickscore')"
    result = run(
        command(workdir, num_batches=2, evaluation__metrics=metrics, evaluation__every=1, mesh__data=1), environment()
    )
    assert result.returncode == 0, result.stderr
    assert "config.evaluation.metrics: pickscore is left out. Metric pickscore:" in result.stderr
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["win_rate"]) == {"preference_score", "clip"}
    with (workdir / "evaluation.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    mean = sum(float(row["clip"]) for row in rows if row["model"] == "tuned") / (len(rows) / 2)
    assert abs(mean - summary["tuned"]["clip"]) < 1e-4
    curve = read_metrics(workdir / "metrics.jsonl")
    assert len(curve) == 2 and all({"evaluation/preference_score", "evaluation/clip"} <= set(row) for row in curve)
    assert abs(curve[-1]["evaluation/clip"] - summary["tuned"]["clip"]) < 1e-4, "the last point is the result"
    assert "CLIP score" in (workdir / "report.html").read_text(encoding="utf-8")
