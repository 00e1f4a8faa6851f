"""Properties of the pure core: schedule, DDIM, pairs, loss, scorer input, streams."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from spo_jax import rng
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.process import ddim_distribution, log_prob, predict_x0_and_noise
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.errors import UserError
from spo_jax.preference.losses import spo_loss
from spo_jax.preference.pairs import compact, compare
from spo_jax.preference.scorers import preprocess_images

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
FINITE = st.floats(-3, 3, width=32)


# --------------------------------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 7, 20, 50])
def test_schedule_is_that_of_diffusers(beta_schedule, spacing, num_steps):
    config = dict(beta_schedule=beta_schedule, timestep_spacing=spacing, beta_start=0.001, beta_end=0.02)
    theirs = DDIMScheduler(clip_sample=False, **config)
    theirs.set_timesteps(num_steps)
    ours = make_schedule(config, num_steps)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    assert (ours.previous_timesteps >= 0).all() and (ours.previous_timesteps <= ours.timesteps).all()


@pytest.mark.parametrize(
    "field, value",
    [("beta_schedule", "cosine"), ("timestep_spacing", "even"), ("prediction_type", "flow")],
)
def test_unknown_schedule_value_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        make_schedule(SD15 | {field: value}, 20)


def test_unknown_schedule_field_is_refused_by_name():
    with pytest.raises(UserError, match="beta_wobble"):
        make_schedule(SD15 | {"beta_wobble": 1}, 20)


# ------------------------------------------------------------------------------------------------------------- DDIM
@given(seed=st.integers(0, 100), step=st.integers(0, 19), kind=st.sampled_from(["epsilon", "v_prediction", "sample"]))
def test_predictions_describe_the_same_latents(seed, step, kind):
    schedule = make_schedule(SD15 | {"prediction_type": kind}, 20)
    t = schedule.timesteps[step]
    output, latents = jax.random.normal(jax.random.key(seed), (2, 4, 4, 3))
    x0, eps = predict_x0_and_noise(schedule, output, latents, t)
    alpha = schedule.alphas_cumprod[t]
    np.testing.assert_allclose(jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * eps, latents, atol=1e-4)


@given(step=st.integers(0, 19), eta=st.sampled_from([0.0, 0.3, 1.0]))
def test_step_keeps_the_noise_level(step, eta):
    """Where x0 and eps have variance 0 and 1, the step's mean and sigma give the next level's variance."""
    schedule = make_schedule(SD15, 20)
    t, previous = schedule.timesteps[step], schedule.previous_timesteps[step]
    mean, sigma = ddim_distribution(schedule, jnp.zeros(()), jnp.ones(()), t, previous, eta)
    np.testing.assert_allclose(mean**2 + sigma**2, 1 - schedule.alphas_cumprod[previous], rtol=1e-4)
    assert (sigma == 0) == (eta == 0)


@given(seed=st.integers(0, 100), sigma=st.floats(0.01, 2))
def test_log_prob_is_the_mean_of_the_normal_log_density(seed, sigma):
    sample, mean = np.random.default_rng(seed).standard_normal((2, 4, 4, 3)).astype(np.float32)
    expected = scipy.stats.norm.logpdf(sample, mean, sigma).mean()
    np.testing.assert_allclose(log_prob(sample, mean, jnp.float32(sigma)), expected, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance(scale):
    predict = make_guided_prediction(lambda variables, x, t, c: x * c.mean(axis=(1, 2))[:, None, None, None], scale)
    x, text = jnp.ones((3, 2, 2, 1)), jnp.arange(1.0, 4.0)[:, None, None] * jnp.ones((3, 5, 2))
    output = predict(None, x, jnp.zeros(3), text, jnp.full((1, 5, 2), 0.5))
    np.testing.assert_allclose(output[:, 0, 0, 0], 0.5 + scale * (np.arange(1.0, 4.0) - 0.5), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ pairs
@given(scores=st.lists(FINITE, min_size=2, max_size=6), threshold=st.floats(0, 0.95))
def test_best_against_worst(scores, threshold):
    win, lose, valid = compare(jnp.asarray(scores, jnp.float32), threshold)
    scores = np.asarray(scores, np.float32)
    assert scores[win] == scores.max() and scores[lose] == scores.min()
    p = 1 / (1 + math.exp(-(float(scores.max()) - float(scores.min()))))
    if abs(2 * p - 1 - threshold) > 1e-5:
        assert bool(valid) == (2 * p - 1 > threshold)


def test_scores_that_are_not_finite_make_no_pair():
    assert not compare(jnp.array([1.0, jnp.nan, 0.0]), 0.0)[2]


@given(valid=st.lists(st.booleans(), min_size=1, max_size=30), seed=st.integers(0, 1000))
def test_compaction_is_a_permutation_with_the_valid_first(valid, seed):
    order, count = compact(jax.random.key(seed), jnp.asarray(valid))
    assert sorted(order.tolist()) == list(range(len(valid)))
    assert int(count) == sum(valid)
    assert all(np.asarray(valid)[order[: int(count)]])


def test_every_order_of_the_valid_is_equally_likely():
    valid = jnp.array([True, False, True, True])
    orders = jax.vmap(lambda key: compact(key, valid)[0][:3])(jax.random.split(jax.random.key(0), 6000))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert scipy.stats.chisquare(counts).pvalue > 0.01


# ------------------------------------------------------------------------------------------------------------- loss
@given(win=FINITE, lose=FINITE)
def test_loss_is_bounded_and_clipping_stops_the_gradient(win, lose):
    loss = spo_loss(jnp.float32(win), jnp.float32(lose))
    assert 0.126 <= loss.loss <= 2.134
    gradient = jax.grad(lambda w: spo_loss(w, jnp.float32(lose)).loss)(jnp.float32(win))
    assert (gradient == 0) == bool(loss.win_clipped)
    assert gradient <= 0, "a likelier winner lowers the loss"


def test_loss_starts_at_log_2():
    np.testing.assert_allclose(spo_loss(jnp.zeros(()), jnp.zeros(())).loss, math.log(2), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------- scorer
@pytest.mark.parametrize("shape", [(64, 64), (16, 16), (40, 56), (56, 40), (24, 24)])
def test_scorer_sees_what_pytorch_would_resize(shape):
    images = np.random.default_rng(0).uniform(-1, 1, (2, *shape, 3)).astype(np.float32)
    scale = 24 / min(shape)
    size = tuple(int(side * scale + 0.5) for side in shape)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(images.transpose(0, 3, 1, 2)), size=size, mode="bicubic", align_corners=False
    )
    top, left = (size[0] - 24) // 2, (size[1] - 24) // 2
    expected = (resized[:, :, top : top + 24, left : left + 24] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(preprocess_images(jnp.asarray(images), 24), (expected - mean) / std, atol=2e-5)


def test_streams_differ_by_name_and_step():
    root = jax.random.key(0)
    keys = [rng.stream(root, "a"), rng.stream(root, "b"), rng.stream(root, "a", 0), rng.stream(root, "a", 1)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4
    assert rng.stream(root, "a", 1) == rng.stream(jax.random.key(0), "a", 1)
