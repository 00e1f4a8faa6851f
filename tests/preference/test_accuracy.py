"""Pairwise accuracy and its intervals."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from spo_jax.preference.accuracy import (
    agreement,
    count_accuracy,
    count_difference,
    paired_interval,
    wilson_interval,
)

LABELS = st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.9, 0.1), (0.25, 0.75)])
# Few values, so that equal scores are common.
SCORES = st.tuples(st.integers(-2, 2), st.integers(-2, 2))
ROWS = st.lists(st.tuples(SCORES, SCORES, LABELS, st.booleans()), min_size=1, max_size=12)


def columns(rows):
    scores, other, labels, mask = (np.array(column) for column in zip(*rows, strict=True))
    return scores.astype(np.float32), other.astype(np.float32), labels.astype(np.float32), mask


def by_hand(score, label):
    """The definition: the larger label is the preferred picture; equal scores count one half."""
    if score[0] == score[1]:
        return 0.5
    return float((score[0] > score[1]) == (label[0] > label[1]))


@given(ROWS)
def test_counts_are_those_of_the_definition(rows):
    scores, other, labels, mask = columns(rows)
    used = [i for i in range(len(rows)) if mask[i] and labels[i, 0] != labels[i, 1]]
    ours, theirs = ([by_hand(s[i], labels[i]) for i in used] for s in (scores, other))
    accuracy = count_accuracy(scores, labels, mask)
    assert (float(accuracy.agreed), int(accuracy.count)) == (sum(ours), len(used))
    assert int(accuracy.ties) == mask.sum() - len(used)
    difference = count_difference(scores, other, labels, mask)
    each = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert float(difference.total) == sum(each) and float(difference.squares) == sum(d * d for d in each)
    if used:
        np.testing.assert_allclose(accuracy.value, np.mean(ours), rtol=1e-6)
        np.testing.assert_allclose(difference.value, accuracy.value - np.mean(theirs), atol=1e-6)


@given(ROWS)
def test_it_does_not_matter_which_picture_comes_first_nor_how_pairs_are_batched(rows):
    scores, other, labels, mask = columns(rows)
    whole = count_accuracy(scores, labels, mask), count_difference(scores, other, labels, mask)
    swapped = (
        count_accuracy(scores[:, ::-1], labels[:, ::-1], mask),
        count_difference(scores[:, ::-1], other[:, ::-1], labels[:, ::-1], mask),
    )
    parts = [
        (count_accuracy(scores[s], labels[s], mask[s]), count_difference(scores[s], other[s], labels[s], mask[s]))
        for s in (slice(0, 3), slice(3, None))
    ]
    assert jax.tree.map(float, whole) == jax.tree.map(float, swapped)
    assert jax.tree.map(float, whole) == jax.tree.map(float, jax.tree.map(operator.add, *parts))
    backwards = count_difference(other, scores, labels, mask)
    assert backwards.value == -whole[1].value or math.isnan(backwards.value)
    np.testing.assert_allclose(backwards.interval, [-x for x in whole[1].interval[::-1]], atol=1e-6)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_is_wilsons(counts):
    successes, count = counts
    expected = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, count), expected, atol=1e-9)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, 2 * n), st.just(n))))
def test_interval_contains_the_estimate_and_stays_in_range(counts):
    halves, count = counts
    low, high = wilson_interval(halves / 2, count)
    assert 0 <= low <= halves / 2 / count <= high <= 1 and low < high


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=3000))
def test_paired_interval_contains_the_estimate_and_is_the_normal_one_for_many_pairs(each):
    low, high = paired_interval(sum(each), sum(d * d for d in each), len(each))
    assert -1 <= low <= np.mean(each) <= high <= 1 and low < high
    if len(each) > 1000:
        half = 1.96 * np.std(each) / math.sqrt(len(each))
        np.testing.assert_allclose([low, high], [np.mean(each) - half, np.mean(each) + half], atol=4e-3)


@pytest.mark.parametrize("accuracy, seed", [(0.7, 0), (0.95, 1)])
def test_intervals_hold_the_truth_in_about_95_of_100_cases(accuracy, seed):
    """2,000 experiments of 60 pairs each, on which the other judge is right with 0.6, half of the time together."""
    generator = np.random.default_rng(seed)
    luck = generator.random((2, 2000, 60))
    luck[1] = np.where(generator.random((2000, 60)) < 0.5, luck[0], luck[1])
    ours, theirs = (luck[0] < accuracy).astype(float), (luck[1] < 0.6).astype(float)
    each = ours - theirs
    intervals = [wilson_interval(n, 60) for n in ours.sum(1)]
    paired = [paired_interval(d.sum(), (d * d).sum(), 60) for d in each]
    for found, truth in ((intervals, accuracy), (paired, accuracy - 0.6)):
        assert 0.93 < np.mean([low <= truth <= high for low, high in found]) < 0.98


def test_without_a_pair_nothing_is_known():
    scores, labels = np.zeros((2, 2), np.float32), np.full((2, 2), 0.5, np.float32)
    for mask, ties in ((np.zeros(2, bool), 0), (np.ones(2, bool), 2)):
        accuracy = count_accuracy(scores, labels, mask)
        difference = count_difference(scores, scores, labels, mask)
        assert math.isnan(accuracy.value) and accuracy.interval == (0, 1) and int(accuracy.ties) == ties
        assert math.isnan(difference.value) and difference.interval == (-1, 1)


def test_scores_without_an_order_show_unless_their_row_does_not_count():
    scores = jnp.array([[1, 0], [np.nan, 0], [np.inf, np.inf]])
    labels = np.tile(np.array([[1, 0]], np.float32), (3, 1))
    assert np.isnan(agreement(scores, labels)).tolist() == [False, True, True]
    assert count_accuracy(scores, labels, np.array([True, False, False])).value == 1
    assert math.isnan(count_accuracy(scores, labels, np.array([True, True, False])).value)
