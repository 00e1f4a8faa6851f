"""The statistics against the numbers of an independent float64 computation, and the properties they must have."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.evaluation import statistics

with np.load(Path(__file__).parents[1] / "golden/metrics/golden.npz", allow_pickle=False) as _stored:
    GOLDEN = {name: _stored[name] for name in _stored.files if name.startswith(("stat_", "hpsbench_"))}
BASE, MODEL, INDEX = (GOLDEN[f"stat_{name}"] for name in ("base", "model", "index"))

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))


def random_scores(shape, scale=4):
    """Two models' scores [prompts, seeds] in quarters, so that ties are exact and not rare."""
    prompts, seeds, seed = shape
    return np.random.default_rng(seed).integers(-scale, scale, (2, prompts, seeds)).astype(np.float32) / 4


def close(actual, name, tolerance=1e-9):
    np.testing.assert_allclose(actual, GOLDEN[name], rtol=0, atol=tolerance)


def test_differences():
    diff = statistics.seed_means(MODEL) - statistics.seed_means(BASE)
    close(diff, "stat_diff")
    close(diff.mean(), "stat_mean_diff")
    close(np.median(diff), "stat_median_diff")
    close(statistics.standard_error(diff), "stat_se_mean_diff")


def test_counts_and_win_rates():
    close(statistics.count_prompts(MODEL, BASE), "stat_counts_by_prompt")
    close(statistics.count_images(MODEL, BASE), "stat_counts_by_image")
    close(statistics.prompt_wins(MODEL, BASE).mean(), "stat_win_by_prompt")
    close(statistics.image_wins(MODEL, BASE).mean(), "stat_win_by_image")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mean_diff", statistics.seed_means(MODEL) - statistics.seed_means(BASE)),
        ("win_by_prompt", statistics.prompt_wins(MODEL, BASE)),
        ("win_by_image", statistics.image_wins(MODEL, BASE)),
    ],
)
def test_bootstrap_of_given_draws(name, values):
    means = statistics.resampled_means(values, INDEX)
    close(means, f"stat_boot_{name}")
    close(statistics.percentile_interval(means), f"stat_interval_{name}")


def test_wilson():
    close([statistics.wilson_interval(wins, n) for wins, n in GOLDEN["stat_wilson_cases"]], "stat_wilson")


def test_hpsv2_table():
    table = statistics.hpsv2_benchmark(GOLDEN["hpsbench_scores"])
    close(table.means, "hpsbench_mean", 1e-5)
    close(table.spreads, "hpsbench_spread", 1e-5)
    close(table.average, "hpsbench_average", 1e-5)


def test_every_number_of_the_oracle_is_looked_at():
    checked = {"base", "model", "index", "diff", "mean_diff", "median_diff", "se_mean_diff", "wilson_cases", "wilson"}
    checked |= {"counts_by_prompt", "counts_by_image", "win_by_prompt", "win_by_image"}
    checked |= {f"{kind}_{name}" for kind in ("boot", "interval") for name in ("mean_diff", *_RATES)}
    hps = {"scores", "mean", "spread", "average"}
    assert set(GOLDEN) == {f"stat_{name}" for name in checked} | {f"hpsbench_{name}" for name in hps}


_RATES = ("win_by_prompt", "win_by_image")


@given(SHAPES)
def test_a_model_against_itself(shape):
    scores, _ = random_scores(shape)
    values = np.stack([statistics.seed_means(scores) * 0, statistics.prompt_wins(scores, scores)])
    intervals = statistics.percentile_interval(statistics.bootstrap_means(values, resamples=50))
    np.testing.assert_array_equal(intervals, [[0, 0], [0.5, 0.5]])


@given(SHAPES)
def test_an_interval_of_the_difference_changes_sign_with_the_order(shape):
    one, other = (statistics.seed_means(scores) for scores in random_scores(shape))
    there, back = (
        statistics.percentile_interval(statistics.bootstrap_means(diff, resamples=200, seed=3))
        for diff in (one - other, other - one)
    )
    np.testing.assert_allclose(there, -back[::-1], atol=1e-12)


@given(SHAPES)
def test_win_rates_of_two_models_add_to_one(shape):
    one, other = random_scores(shape)
    for wins in (statistics.prompt_wins, statistics.image_wins):
        np.testing.assert_array_equal(wins(one, other) + wins(other, one), 1)
    for count in (statistics.count_prompts, statistics.count_images):
        assert count(one, other) == count(other, one)[::-1]
    assert sum(statistics.count_images(one, other)) == one.size


@given(SHAPES)
def test_with_one_seed_both_win_rates_are_the_same(shape):
    one, other = (scores[:, :1] for scores in random_scores(shape))
    np.testing.assert_array_equal(statistics.prompt_wins(one, other), statistics.image_wins(one, other))


def test_win_rates_differ_where_one_seed_decides():
    """Three small losses and one large win: the seed mean wins, most images lose."""
    first = np.zeros((1, 4), np.float32)
    model = np.array([[-1, -1, -1, 9]], np.float32)
    assert statistics.prompt_wins(model, first).mean() == 1
    assert statistics.image_wins(model, first).mean() == 0.25


@given(st.integers(1, 200))
def test_the_size_of_a_piece_does_not_matter(piece):
    values = np.random.default_rng(0).normal(size=(3, 17))
    whole = statistics.bootstrap_means(values, resamples=100, seed=5)
    pieces = statistics.bootstrap_means(values, resamples=100, seed=5, piece=piece)
    np.testing.assert_allclose(pieces, whole, rtol=1e-12, atol=1e-12)


def test_the_seed_decides_and_leading_axes_share_the_draws():
    values = np.random.default_rng(0).normal(size=(2, 3, 17))
    one, again, other = (statistics.bootstrap_means(values, resamples=100, seed=seed) for seed in (1, 1, 2))
    assert one.shape == (2, 3, 100)
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    np.testing.assert_allclose(statistics.bootstrap_means(values[1, 2], resamples=100, seed=1), one[1, 2], rtol=1e-12)


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    """Means of 60 normal numbers: their 95 % interval should hold 0 in 95 % of 300 experiments, within 4 %."""
    experiments = np.random.default_rng(1).normal(size=(300, 60))
    low, high = statistics.percentile_interval(statistics.bootstrap_means(experiments, resamples=1000)).T
    assert abs(np.mean((low <= 0) & (high >= 0)) - 0.95) < 0.04


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_holds_its_rate_and_mirrors(count, part, level):
    wins = round(2 * part * count) / 2
    low, high = statistics.wilson_interval(wins, count, level)
    assert 0 <= low <= wins / count + 1e-12 and wins / count - 1e-12 <= high <= 1
    np.testing.assert_allclose(statistics.wilson_interval(count - wins, count, level), (1 - high, 1 - low), atol=1e-12)


def test_a_single_prompt_has_no_standard_error():
    assert statistics.standard_error(np.ones(1)) is None


@given(SHAPES, st.floats(0.1, 100))
def test_disagreement_does_not_depend_on_a_metrics_scale(shape, scale):
    one, other = random_scores(shape)
    expected = statistics.disagreement(np.stack([one, other]))
    assert expected.shape == one.shape and np.all(expected >= 0)
    np.testing.assert_allclose(statistics.disagreement(np.stack([one * scale, other])), expected, atol=1e-4)
    np.testing.assert_allclose(statistics.disagreement(np.stack([one, one * scale])), 0, atol=1e-4)


def test_a_metric_that_never_changes_counts_as_a_tie():
    differences = np.array([[[1.0], [-1.0], [1.0]], [[0.1], [0.1], [0.1]]])
    np.testing.assert_allclose(statistics.disagreement(differences)[:, 0], 1 / np.std([1, -1, 1]))
