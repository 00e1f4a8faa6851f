"""The example of docs/scorers.md: it trains, and a function that does not fit ends with one sentence."""

import json
import re

import jax
import numpy as np
import pytest

from spo_jax.evaluation.metrics import colorfulness
from tests.small_pipeline import small_pipeline
from tests.system.commands import ROOT, command, environment
from tests.system.forks import run_forked


@pytest.fixture
def example(tmp_path):
    """The page's ``my_scorer.py`` in a folder of its own, which is the working directory of the command."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scorers.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 20
    (tmp_path / "my_scorer.py").write_text(code, encoding="utf-8")
    return tmp_path


def run_in(folder, arguments):
    env = environment() | {"PYTHONPATH": str(ROOT)}
    arguments = [a.replace("configs/tiny.py", str(ROOT / "configs/tiny.py")) for a in arguments]
    return run_forked(arguments, env, cwd=folder)


def test_the_example_is_the_true_preference_and_trains(example, monkeypatch):
    monkeypatch.syspath_prepend(example)
    images = jax.random.uniform(jax.random.key(0), (5, 8, 8, 3), minval=-1, maxval=1)
    score = __import__("my_scorer").score
    np.testing.assert_allclose(score(images, None, None), colorfulness(images) / 10, rtol=1e-5)

    result = run_in(
        example, command(example / "w", num_batches=1, scorer__fn="my_scorer:score", model=small_pipeline())
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads((example / "w" / "summary.json").read_text(encoding="utf-8"))
    for model in ("base", "tuned"):
        np.testing.assert_allclose(summary[model]["preference_score"], summary[model]["colorfulness"] / 10, rtol=1e-4)
    assert summary["config"]["scorer"]["fn"] == "my_scorer:score"


def test_a_function_that_does_not_fit_ends_with_one_sentence(example):
    text = (example / "my_scorer.py").read_text(encoding="utf-8")
    (example / "flat.py").write_text(text.replace("axes = (-2, -1)", "axes = (-3, -2, -1)"), encoding="utf-8")
    for fn, words in (("flat:score", "float32 [24]"), ("absent:score", "there is no module absent")):
        result = run_in(example, command(example / "w", scorer__fn=fn))
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2 and last.startswith("spo_jax: error: ") and words in last, result.stderr
        assert not (example / "w").exists()
