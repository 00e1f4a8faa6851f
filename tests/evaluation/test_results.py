"""``results.json`` holds the numbers that the statistics give, and says how they were made."""

import json

import numpy as np
import pytest

from spo_jax.errors import UserError
from spo_jax.evaluation import statistics
from spo_jax.evaluation.results import MetricText, read_results, summarise, write_results
from spo_jax.evaluation.score_table import ScoreTable


def make_table(models=3, metrics=2, prompts=9, seeds=4):
    scores = np.random.default_rng(0).integers(-8, 8, (models, metrics, prompts, seeds)).astype(np.float32) / 4
    names = [tuple(f"{kind}{i}" for i in range(n)) for kind, n in (("model", models), ("metric", metrics))]
    return ScoreTable(*names, tuple(f"prompt {i}" for i in range(prompts)), tuple(range(seeds)), scores)


def test_numbers_are_those_of_the_statistics():
    table = make_table()
    results = summarise(table, {}, resamples=300, seed=4)
    scores, first = table.scores[2, 1], table.scores[0, 1]
    entry = results["results"]["model2"]["metric1"]

    def interval(values):
        means = statistics.bootstrap_means(values, resamples=300, seed=4)
        return pytest.approx(statistics.percentile_interval(means))

    means = statistics.seed_means(scores)
    assert entry["mean"] == pytest.approx(scores.mean())
    assert entry["interval"] == interval(means)
    assert entry["median"] == np.median(means)
    assert entry["mean_of_each_seed"] == pytest.approx(scores.mean(0))
    against = entry["against_first"]
    assert against["mean_difference"] == pytest.approx(scores.mean() - first.mean())
    assert against["interval"] == interval(means - statistics.seed_means(first))
    for name, wins, count in (
        ("win_rate_of_seed_means", statistics.prompt_wins, statistics.count_prompts),
        ("win_rate_of_images", statistics.image_wins, statistics.count_images),
    ):
        won = wins(scores, first)
        rate = against[name]
        assert rate["rate"] == pytest.approx(won.mean())
        assert rate["interval"] == interval(won)
        assert rate["wilson"] == pytest.approx(statistics.wilson_interval(won.sum(), 9))
        assert (rate["won"], rate["tied"], rate["lost"]) == count(scores, first)


def test_what_stands_beside_the_numbers():
    settings = {"guidance": 7.5, "hashes": {"weights": "ab12"}, "seeds": np.arange(2), "dtype": np.dtype("float32")}
    metrics = {"metric0": MetricText("HPSv2.1", "Of people's choices.", ".2f")}
    results = summarise(
        make_table(), settings, metrics=metrics, roles={("model1", "metric0"): "It was trained on it."}, resamples=20
    )
    assert results["settings"] == {
        "guidance": 7.5,
        "hashes": {"weights": "ab12"},
        "seeds": [0, 1],
        "dtype": "float32",
    }
    assert results["metrics"]["metric0"]["title"] == "HPSv2.1" and results["metrics"]["metric1"]["title"] == "metric1"
    assert results["results"]["model1"]["metric0"]["role"] == "It was trained on it."
    assert "role" not in results["results"]["model2"]["metric0"]
    assert "against_first" not in results["results"]["model0"]["metric0"]
    assert (results["prompts"], results["seeds"]) == (9, [0, 1, 2, 3])
    assert results["statistics"]["resamples"] == 20 and results["statistics"]["level"] == 0.95


def test_a_file_is_read_back(tmp_path):
    results = summarise(make_table(), {"infinite": float("inf")}, resamples=20)
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    (tmp_path / "results.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="cannot be read as results"):
        read_results(tmp_path / "results.json")


def test_a_model_against_its_copy():
    table = make_table(models=2)
    table.scores[1] = table.scores[0]
    entry = summarise(table, {}, resamples=50)["results"]["model1"]["metric0"]["against_first"]
    assert entry["interval"] == [0, 0] and entry["win_rate_of_images"]["interval"] == [0.5, 0.5]


def test_one_prompt_has_no_intervals():
    entry = summarise(make_table(prompts=1), {}, resamples=5)["results"]["model1"]["metric0"]
    assert entry["interval"] is None and entry["standard_error"] is None
    assert entry["against_first"]["win_rate_of_images"]["interval"] is None


def test_a_role_of_nobody_is_refused():
    with pytest.raises(UserError, match="role is given to metric0 of model other"):
        summarise(make_table(), {}, roles={("other", "metric0"): "x"})
