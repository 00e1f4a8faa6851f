"""The objective: bounds, clipping, direction; and a loss over a minibatch with a mask."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.preference.losses import OBJECTIVES, LossOptions, PairOutputs, preference_loss, spo_loss
from spo_jax.spo.update import make_loss, pair_losses
from spo_jax.types import PreferencePairs, PromptBatch

LOG_RATIO = st.floats(-0.75, 0.75, width=32)


@given(win=LOG_RATIO, lose=LOG_RATIO, beta=st.sampled_from([1.0, 10.0, 30.0]), clip=st.sampled_from([0.05, 0.1, 0.5]))
def test_value_and_gradient_are_those_of_pytorch(win, lose, beta, clip):
    win_t, lose_t = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (win, lose))
    ratios = [torch.clamp(torch.exp(x), 1 - clip, 1 + clip) for x in (win_t, lose_t)]
    expected = -torch.nn.functional.logsigmoid(beta * (ratios[0].log() - ratios[1].log()))
    expected.backward()

    def loss(win, lose):
        return spo_loss(win, lose, beta=beta, clip_range=clip).loss

    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(jnp.float32(win), jnp.float32(lose))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4, atol=1e-5)
    for ours, theirs, log_ratio in zip(gradient, (win_t.grad, lose_t.grad), (win, lose), strict=True):
        if min(abs(math.exp(log_ratio) - edge) for edge in (1 - clip, 1 + clip)) > 1e-5:
            np.testing.assert_allclose(ours, theirs.item(), rtol=1e-3, atol=1e-4)


@given(a=LOG_RATIO, b=LOG_RATIO, lose=LOG_RATIO)
def test_loss_falls_with_the_winner_and_rises_with_the_loser(a, b, lose):
    low, high = sorted((a, b))
    assert spo_loss(jnp.float32(high), lose).loss <= spo_loss(jnp.float32(low), lose).loss
    assert spo_loss(jnp.float32(lose), jnp.float32(high)).loss >= spo_loss(jnp.float32(lose), jnp.float32(low)).loss


@pytest.mark.parametrize("win, lose, bound", [(9.0, -9.0, 0.126), (-9.0, 9.0, 2.133)])
def test_bounds_are_reached(win, lose, bound):
    result = spo_loss(jnp.float32(win), jnp.float32(lose))
    np.testing.assert_allclose(result.loss, bound, atol=5e-4)
    assert result.win_clipped == result.lose_clipped == 1


@given(win=LOG_RATIO, lose=LOG_RATIO)
def test_what_is_logged_is_not_clipped(win, lose):
    result = spo_loss(jnp.float32(win), jnp.float32(lose))
    np.testing.assert_allclose([result.win_ratio, result.lose_ratio], np.exp([win, lose]), rtol=1e-5)
    for flag, ratio in ((result.win_clipped, result.win_ratio), (result.lose_clipped, result.lose_ratio)):
        assert flag == float(ratio < np.float32(0.9) or ratio > np.float32(1.1))


@pytest.fixture(scope="module")
def minibatch():
    """A loss over a network of one number, prompts and five pairs close to the policy's own means."""
    schedule = make_schedule({"beta_schedule": "scaled_linear", "steps_offset": 1}, 20)

    def network(variables, latents, timesteps, context):
        moved = variables.get("lora", 0.0)
        return (variables["params"] + moved) * latents * context.mean((1, 2))[:, None, None, None]

    generator = np.random.default_rng(0)
    latents, win, lose = generator.standard_normal((3, 5, 2, 2, 1)).astype(np.float32)
    t = schedule.timesteps[jnp.array([3, 5, 9, 12, 15])]
    pairs = PreferencePairs(latents, latents + 0.1 * win, latents + 0.1 * lose, t, t - 50, None)
    prompts = PromptBatch(jnp.stack([jnp.full((3, 2), 0.5), jnp.ones((3, 2))]), jnp.full((1, 3, 2), 0.2), None)
    prompts = prompts.map_rows(lambda rows: rows[jnp.array([0, 1, 0, 1, 1])])
    loss = make_loss(make_guided_prediction(network, 5.0), schedule, OBJECTIVES["spo"], LossOptions())
    of_lora = jax.value_and_grad(lambda lora, *rest: loss({"lora": lora}, None, *rest), has_aux=True)
    return jax.jit(of_lora), pairs, prompts


def test_loss_of_untouched_adapters_is_log_2_and_yet_has_a_gradient(minibatch):
    loss, pairs, prompts = minibatch
    (value, sums), gradient = loss(jnp.zeros(()), 0.1, prompts, pairs, jnp.ones(5, bool))
    np.testing.assert_allclose(value, math.log(2), rtol=1e-6)
    np.testing.assert_allclose([sums.win_ratio, sums.lose_ratio], 5, rtol=1e-6)
    assert gradient != 0


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1]])
def test_masked_pairs_have_no_part_in_mean_or_gradient(minibatch, mask):
    loss, pairs, prompts = minibatch
    mask = jnp.array(mask, bool)
    (value, sums), gradient = loss(jnp.full((), 1e-3), 0.1, prompts, pairs, mask)
    # What a masked pair holds must not matter, not even where it is not a number.
    broken = pairs.replace(win=jnp.where(mask[:, None, None, None], pairs.win, jnp.inf))
    (other, _), _ = loss(jnp.full((), 1e-3), 0.1, prompts, broken, mask)
    np.testing.assert_array_equal(value, other)
    single = [loss(jnp.full((), 1e-3), 0.1, prompts, pairs, jnp.arange(5) == i) for i in range(5)]
    np.testing.assert_allclose(value, np.mean([s[0][0] for s, m in zip(single, mask, strict=True) if m]), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.mean([s[1] for s, m in zip(single, mask, strict=True) if m]), rtol=1e-4)
    np.testing.assert_allclose(sums.loss, value * mask.sum(), rtol=1e-5)


def test_empty_minibatch_has_no_loss_and_no_gradient(minibatch):
    loss, pairs, prompts = minibatch
    (value, _), gradient = loss(jnp.full((), 1e-3), 0.1, prompts, pairs, jnp.zeros(5, bool))
    assert value == 0 and gradient == 0


def test_pairs_with_two_starts_are_those_with_one_where_the_starts_agree(minibatch):
    loss, pairs, prompts = minibatch
    mask = jnp.ones(5, bool)
    (value, sums), gradient = loss(jnp.full((), 1e-3), 0.1, prompts, pairs, mask)
    twice = pairs.replace(lose_latents=pairs.latents)
    (other, other_sums), other_gradient = loss(jnp.full((), 1e-3), 0.1, prompts, twice, mask)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-5)
    np.testing.assert_allclose(jax.tree.leaves(sums), jax.tree.leaves(other_sums), rtol=1e-6)


def test_win_and_lose_are_measured_from_their_own_starts(minibatch):
    """Each ratio of a pair with two starts is that of a pair which shares that start."""
    loss, pairs, prompts = minibatch
    mask, moved = jnp.ones(5, bool), 0.9 * pairs.latents + 0.1
    apart = pairs.replace(lose_latents=moved, lose=pairs.lose + moved - pairs.latents)
    (_, sums), _ = loss(jnp.full((), 1e-3), 0.1, prompts, apart, mask)
    (_, from_win), _ = loss(jnp.full((), 1e-3), 0.1, prompts, apart.replace(lose_latents=None), mask)
    (_, from_lose), _ = loss(jnp.full((), 1e-3), 0.1, prompts, apart.replace(latents=moved, lose_latents=None), mask)
    np.testing.assert_allclose(sums.win_ratio, from_win.win_ratio, rtol=1e-6)
    np.testing.assert_allclose(sums.lose_ratio, from_lose.lose_ratio, rtol=1e-6)
    assert abs(from_win.lose_ratio - from_lose.lose_ratio) > 1e-4


def test_outputs_of_one_pair_for_all_are_refused(minibatch):
    _, pairs, _ = minibatch
    schedule = make_schedule({"beta_schedule": "scaled_linear", "steps_offset": 1}, 20)
    outputs = PairOutputs(pairs.latents, pairs.latents[:1])
    with pytest.raises((AssertionError, TypeCheckError), match="shape"):
        pair_losses(OBJECTIVES["spo"], schedule, outputs, pairs, LossOptions())


def test_network_runs_once_a_pair_and_on_both_starts_only_where_they_may_differ(minibatch):
    _, pairs, prompts = minibatch
    rows = []

    def network(variables, latents, timesteps, context):
        rows.append(latents.shape[0])
        return (variables["params"] + variables.get("lora", 0.0)) * latents

    schedule = make_schedule({"beta_schedule": "scaled_linear", "steps_offset": 1}, 20)
    loss = make_loss(make_guided_prediction(network, 5.0), schedule, OBJECTIVES["spo"], LossOptions())
    for lose_latents, starts in ((None, 1), (pairs.latents, 2)):
        rows.clear()
        loss({"lora": 0.0}, None, 0.1, prompts, pairs.replace(lose_latents=lose_latents), jnp.ones(5, bool))
        assert rows == [2 * 5 * starts] * 2, "both halves of guidance, for policy and reference"


# -------------------------------------------------------------------------------------------- the preference model's
@given(a=st.floats(-5, 5), b=st.floats(-5, 5))
def test_preference_loss_of_pairs_and_ties(a, b):
    scores = jnp.array([a, b])
    first, second = (preference_loss(scores, jnp.array(labels)) for labels in ([1.0, 0.0], [0.0, 1.0]))
    np.testing.assert_allclose([first, second], -np.log([1 / (1 + np.exp(b - a)), 1 / (1 + np.exp(a - b))]), rtol=1e-4)
    tie = preference_loss(scores, jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(tie, (first + second) / 2 - math.log(2), atol=1e-5)
    assert tie >= -1e-6
    np.testing.assert_allclose(preference_loss(jnp.array([a, a]), jnp.array([0.5, 0.5])), 0.0, atol=1e-6)


def test_labels_of_several_pairs_are_refused():
    with pytest.raises((AssertionError, TypeCheckError), match=r"labels|shape"):
        preference_loss(jnp.zeros(2), jnp.zeros((3, 2)))
