"""Choosing and shuffling pairs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from spo_jax.preference.pairs import compact, compare, constant_threshold, draw_two, make_pairs
from spo_jax.types import Pool

SCORES = st.lists(st.floats(-4, 4, width=16), min_size=2, max_size=6).map(lambda x: np.array(x, np.float32))


@given(scores=SCORES, shift=st.floats(-8, 8, width=16), seed=st.integers(0, 1000))
def test_comparison_sees_differences_only_and_no_order(scores, shift, seed):
    win, lose, valid = compare(jnp.asarray(scores), 0.3)
    shifted = compare(jnp.asarray(scores + np.float32(shift)), 0.3)  # 16-bit values: the sums are exact
    assert (win, lose, valid) == tuple(shifted)
    order = np.random.default_rng(seed).permutation(len(scores))
    other_win, other_lose, other_valid = compare(jnp.asarray(scores[order]), 0.3)
    assert scores[order][other_win] == scores[win] and scores[order][other_lose] == scores[lose]
    assert other_valid == valid


@given(scores=SCORES)
def test_mirrored_scores_exchange_win_and_lose(scores):
    win, lose, valid = compare(jnp.asarray(scores), 0.3)
    mirrored_win, mirrored_lose, mirrored_valid = compare(jnp.asarray(-scores), 0.3)
    assert (win, lose, valid) == (mirrored_lose, mirrored_win, mirrored_valid)


@given(scores=SCORES, low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_higher_threshold_keeps_fewer(scores, low, high):
    low, high = sorted((low, high))
    assert compare(jnp.asarray(scores), high)[2] <= compare(jnp.asarray(scores), low)[2]
    assert not compare(jnp.asarray(scores), 1.0)[2], "no preference is surer than certain"


@given(scores=SCORES, threshold=st.floats(0, 0.95))
def test_best_against_worst_is_valid_above_the_threshold(scores, threshold):
    win, lose, valid = compare(jnp.asarray(scores), threshold)
    assert scores[win] == scores.max() and scores[lose] == scores.min()
    p = 1 / (1 + math.exp(float(scores.min()) - float(scores.max())))
    if abs(2 * p - 1 - threshold) > 1e-5:
        assert bool(valid) == (2 * p - 1 > threshold)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_equal_scores_and_scores_that_are_not_finite_make_no_pair(position):
    assert not compare(jnp.full(3, 0.7), 0.0)[2]
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        assert not compare(jnp.array([0.0, 1.0, 2.0]).at[position].set(value), 0.0)[2]


@pytest.mark.parametrize("seed", [0, 7])
def test_order_belongs_to_the_key(seed):
    valid = jnp.array([True, False, True, True, False, True])
    a, b = (compact(jax.random.key(seed), valid)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_different_keys_give_different_orders():
    valid = jnp.ones(20, bool).at[::3].set(False)
    orders = jax.vmap(lambda key: compact(key, valid)[0])(jax.random.split(jax.random.key(1), 50))
    assert len(np.unique(np.asarray(orders)[:, :13], axis=0)) == 50
    # Pairs of early and of late steps meet in a minibatch: no place in the order belongs to one of them.
    first = np.asarray(orders)[:, 0]
    assert len(np.unique(first)) > 8 and (valid[first]).all()


@given(valid=st.sampled_from([2, 5, 13]).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)))
def test_compaction_is_a_permutation_with_the_valid_first(valid):
    order, count = compact(jax.random.key(len(valid)), jnp.asarray(valid))
    assert sorted(order.tolist()) == list(range(len(valid)))
    assert int(count) == sum(valid) and all(np.asarray(valid)[order[: int(count)]])


def test_every_order_of_the_valid_is_equally_likely():
    valid = jnp.array([True, False, True, True])
    orders = jax.vmap(lambda key: compact(key, valid)[0][:3])(jax.random.split(jax.random.key(0), 6000))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert scipy.stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("valid", [False, True])
def test_all_or_nothing(valid):
    order, count = compact(jax.random.key(0), jnp.full(6, valid))
    assert sorted(order.tolist()) == list(range(6)) and int(count) == 6 * valid
    assert order.dtype == count.dtype == jnp.int32


def test_pairs_of_one_step_and_prompt_come_from_its_candidates():
    generator = np.random.default_rng(0)
    steps, batch, k = 3, 2, 4
    pool = Pool(
        latents=jnp.arange(steps * batch, dtype=jnp.float32).reshape(steps, batch, 1, 1, 1),
        candidates=jnp.arange(steps * batch * k, dtype=jnp.float32).reshape(steps, batch, k, 1, 1, 1),
        scores=jnp.asarray(generator.standard_normal((steps, batch, k)), jnp.float32).at[1, 0].set(0.5),
        timesteps=jnp.array([30, 20, 10]),
        previous_timesteps=jnp.array([20, 10, 0]),
    )
    pairs = make_pairs(pool, constant_threshold(0.1))
    assert pairs.valid.tolist() == [[True, True], [False, True], [True, True]]
    late = make_pairs(pool, lambda timesteps: jnp.where(timesteps > 15, 1.0, 0.0))
    assert late.valid.tolist() == [[False, False], [False, False], [True, True]], "by the timestep drawn from"
    np.testing.assert_array_equal(pairs.latents.ravel(), np.arange(6))
    np.testing.assert_array_equal(pairs.win.ravel(), 4 * np.arange(6) + np.asarray(pool.scores).argmax(-1).ravel())
    np.testing.assert_array_equal(pairs.lose.ravel(), 4 * np.arange(6) + np.asarray(pool.scores).argmin(-1).ravel())
    np.testing.assert_array_equal(pairs.timesteps, [[30, 30], [20, 20], [10, 10]])
    np.testing.assert_array_equal(pairs.previous_timesteps, [[20, 20], [10, 10], [0, 0]])


# ------------------------------------------------------------------------------------------------------ pairs at random
@pytest.mark.parametrize("k", [2, 3, 4])
def test_two_candidates_are_different_and_every_two_equally_likely(k):
    drawn = np.asarray(draw_two(jax.random.key(k), (60, 100), k))
    assert drawn.shape == (60, 100, 2) and drawn.min() == 0 and drawn.max() == k - 1
    ordered, counts = np.unique(drawn.reshape(-1, 2), axis=0, return_counts=True)
    assert len(ordered) == k * (k - 1) and (ordered[:, 0] != ordered[:, 1]).all()
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def scored_pool(inner=0, steps=5, batch=3, k=4, seed=0):
    """Candidates are their own numbers, so that a pair tells where it comes from."""
    segments = -(-steps // (inner + 1))
    scores = np.random.default_rng(seed).standard_normal((segments, batch, k))
    return Pool(
        latents=jnp.full((segments, batch, 1, 1, 1), -1.0),
        candidates=jnp.arange(steps * batch * k, dtype=jnp.float32).reshape(steps, batch, k, 1, 1, 1),
        scores=jnp.asarray(scores, jnp.float32),
        timesteps=jnp.arange(10 * steps, 0, -10),
        previous_timesteps=jnp.arange(10 * steps - 10, -1, -10),
        num_inner_steps=inner,
    )


@pytest.mark.parametrize("inner, seed", [(0, 0), (0, 1), (1, 2)])
def test_a_random_pair_is_of_the_two_that_were_drawn_the_better_one_wins(inner, seed):
    pool = scored_pool(inner, seed=seed)
    drawn = draw_two(jax.random.key(seed), pool.scores.shape[:2], 4)
    pairs, best_worst = (make_pairs(pool, constant_threshold(0.3), which) for which in (drawn, None))
    pool, pairs, drawn = jax.tree.map(np.asarray, (pool, pairs, drawn))
    for s, b in np.ndindex(5, 3):
        segment = s // (inner + 1)
        better, worse = sorted(drawn[segment, b].tolist(), key=lambda i: -pool.scores[segment, b, i])
        assert pairs.win[s, b] == pool.candidates[s, b, better] and pairs.lose[s, b] == pool.candidates[s, b, worse]
        margin = math.tanh(float(pool.scores[segment, b, better] - pool.scores[segment, b, worse]) / 2)
        assert abs(margin - 0.3) < 1e-5 or bool(pairs.valid[s, b]) == (margin > 0.3)
    assert (~pairs.valid | best_worst.valid).all(), "no two candidates differ more than the best and the worst"


def test_to_look_at_all_candidates_in_any_order_is_the_default():
    pool = scored_pool()
    order = jnp.broadcast_to(jnp.array([2, 0, 3, 1]), pool.scores.shape)
    pairs, default = (make_pairs(pool, constant_threshold(0.3), which) for which in (order, None))
    jax.tree.map(np.testing.assert_array_equal, pairs, default)


# ------------------------------------------------------------------------------------------------- ranges of timesteps
@pytest.mark.parametrize("inner, low, high", [(0, 20, 50), (0, 0, 60), (0, 51, 60), (1, 20, 31), (2, 0, 11)])
def test_pairs_outside_the_range_of_timesteps_are_invalid_and_the_others_as_before(inner, low, high):
    pool = scored_pool(inner)
    pairs, default = (make_pairs(pool, constant_threshold(0.1), None, r) for r in ((low, high), (0, 1000)))
    inside = (low <= np.asarray(default.timesteps)) & (np.asarray(default.timesteps) < high)
    np.testing.assert_array_equal(pairs.valid, default.valid & inside)
    for name in ("latents", "win", "lose", "timesteps", "previous_timesteps"):
        np.testing.assert_array_equal(getattr(pairs, name), getattr(default, name))
    jax.tree.map(np.testing.assert_array_equal, default, make_pairs(pool, constant_threshold(0.1)))


@pytest.mark.parametrize("name", ["scores", "latents"])
def test_a_pool_that_lacks_a_segment_is_refused(name):
    shapes = {"latents": (3, 2, 1, 1, 1), "candidates": (3, 2, 4, 1, 1, 1), "scores": (3, 2, 4)}
    arrays = {key: jnp.zeros((shape[0] - (key == name), *shape[1:])) for key, shape in shapes.items()}
    pool = Pool(**arrays, timesteps=jnp.array([30, 20, 10]), previous_timesteps=jnp.array([20, 10, 0]))
    with pytest.raises((AssertionError, TypeCheckError), match="shape"):
        make_pairs(pool, constant_threshold(0.0))
