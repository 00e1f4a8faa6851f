"""The DDIM step and the plain sampler against diffusers, and the log-probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.diffusion.ddim import sample
from spo_jax.diffusion.process import Gaussian, log_prob
from spo_jax.diffusion.schedule import PREDICTION_TYPES, make_schedule

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
STEP, ETA, SEED = st.integers(0, 19), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 1000)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def schedule(kind="epsilon"):
    return make_schedule(CONFIG | {"prediction_type": kind}, 20)


@given(seed=SEED, step=st.integers(0, 18), eta=ETA, kind=st.sampled_from(PREDICTION_TYPES))
def test_step_is_that_of_diffusers(seed, step, eta, kind):
    """The last step aside: there diffusers goes to another final noise level, by ``set_alpha_to_one``."""
    theirs = DDIMScheduler(clip_sample=False, prediction_type=kind, **CONFIG)
    theirs.set_timesteps(20)
    output, latents, noise = normal(seed, 3, 1, 3, 2, 4)
    t = int(theirs.timesteps[step])
    given_to_both = (torch.from_numpy(output), t, torch.from_numpy(latents))
    expected = theirs.step(*given_to_both, eta=eta, variance_noise=torch.from_numpy(noise))
    s = schedule(kind)
    x0, eps = s.to_x0_and_noise(jnp.asarray(output), jnp.asarray(latents), s.timesteps[step])
    mean, sigma = s.transition(x0, eps, s.timesteps[step], s.previous_timesteps[step], eta)
    scale = max(1.0, float(np.abs(x0).max()))
    np.testing.assert_allclose(x0, expected.pred_original_sample.numpy(), rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(mean + sigma * noise, expected.prev_sample.numpy(), rtol=0, atol=1e-4 * scale)


@given(step=STEP)
def test_sigma_is_proportional_to_eta_and_positive(step):
    s = schedule()
    at = (jnp.zeros(2), jnp.ones(2), s.timesteps[step], s.previous_timesteps[step])
    sigma = {eta: float(s.transition(*at, eta).sigma) for eta in (0.0, 0.5, 1.0)}
    assert sigma[0.0] == 0 and sigma[1.0] > 0
    np.testing.assert_allclose(sigma[0.5], 0.5 * sigma[1.0], rtol=1e-6)


@given(seed=SEED, step=STEP)
def test_the_arithmetic_is_float32_whatever_the_network_runs_in(seed, step):
    s = schedule()
    output, latents = (jnp.asarray(x, jnp.bfloat16) for x in normal(seed, 2, 4, 4, 3))
    low = s.to_x0_and_noise(output, latents, s.timesteps[step])
    high = s.to_x0_and_noise(output.astype(jnp.float32), latents.astype(jnp.float32), s.timesteps[step])
    for a, b in zip(low, high, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
    assert log_prob(latents, Gaussian(low[0], jnp.float32(0.1))).dtype == jnp.float32


@given(seed=SEED, sigma=st.floats(0.01, 2), shift=st.floats(-1, 1))
def test_log_prob_is_highest_at_the_mean_and_independent_of_the_size(seed, sigma, shift):
    mean, sigma = jnp.asarray(normal(seed, 4, 2, 3)), jnp.float32(sigma)
    at_mean, off = log_prob(mean, Gaussian(mean, sigma)), log_prob(mean + shift, Gaussian(mean, sigma))
    np.testing.assert_allclose(at_mean, -np.log(sigma) - 0.5 * np.log(2 * np.pi), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(at_mean - off, shift**2 / (2 * sigma**2), rtol=1e-2, atol=1e-4)
    twice = log_prob(jnp.tile(mean + shift, 2), Gaussian(jnp.tile(mean, 2), sigma))
    np.testing.assert_allclose(twice, off, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_eta_0_is_deterministic_and_a_perfect_network_is_followed_to_its_picture(kind):
    """A network that knows x0 exactly leads there, whatever the start, and noise has no part in it."""
    s = schedule(kind)
    x0 = jnp.asarray(normal(0, 2, 3, 3, 1))

    def predict(latents, t):
        a = s.alphas_cumprod[t]
        eps = (latents - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        return {"epsilon": eps, "v_prediction": jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x0, "sample": x0}[kind]

    initial = jnp.asarray(normal(1, 2, 3, 3, 1))
    run = jax.jit(lambda noise: sample(predict, s, initial, noise))
    plain, noisy = sample(predict, s, initial), run(jnp.asarray(normal(2, 20, 2, 3, 3, 1)))
    np.testing.assert_allclose(plain, noisy, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(noisy, run(jnp.asarray(normal(3, 20, 2, 3, 3, 1))))
    final = s.alphas_cumprod[0]
    spread = float(jnp.sqrt(1 - final)) * np.abs(initial - x0).max() + 0.05
    np.testing.assert_allclose(plain, jnp.sqrt(final) * x0, rtol=0, atol=spread)


def test_stochastic_sampling_needs_its_noise():
    with pytest.raises(ValueError, match="noise"):
        sample(lambda x, t: x, schedule(), jnp.zeros((1, 2, 2, 1)), eta=1.0)
