"""The process of a schedule: what an output stands for, the noise level of a step, and the log-probability."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.diffusion.process import Gaussian, log_prob
from spo_jax.diffusion.schedule import PREDICTION_TYPES, make_schedule

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
STEP, SEED = st.integers(0, 19), st.integers(0, 100)


@given(seed=SEED, step=STEP, kind=st.sampled_from(PREDICTION_TYPES))
def test_x0_and_noise_of_an_output_make_up_the_latents(seed, step, kind):
    process = make_schedule(CONFIG | {"prediction_type": kind}, 20)
    t = process.timesteps[step]
    output, latents = jax.random.normal(jax.random.key(seed), (2, 4, 4, 3))
    x0, noise = process.to_x0_and_noise(output, latents, t)
    np.testing.assert_allclose(process.add_noise(x0, noise, t), latents, atol=1e-4)


@given(step=STEP, eta=st.sampled_from([0.0, 0.3, 1.0]))
def test_a_step_arrives_at_the_noise_level_of_its_timestep(step, eta):
    """Of a clean latent 0 and noise 1, the variance of mean and sigma together is that of the level arrived at."""
    process = make_schedule(CONFIG, 20)
    t, previous = process.timesteps[step], process.previous_timesteps[step]
    mean, sigma = process.transition(jnp.zeros(()), jnp.ones(()), t, previous, eta)
    level = process.add_noise(jnp.zeros(()), jnp.ones(()), previous)
    np.testing.assert_allclose(mean**2 + sigma**2, level**2, rtol=1e-4)
    assert (sigma == 0) == (eta == 0)


@given(seed=SEED, sigma=st.floats(0.01, 2))
def test_log_prob_is_the_mean_of_the_normal_log_density(seed, sigma):
    sample, mean = np.random.default_rng(seed).standard_normal((2, 4, 4, 3)).astype(np.float32)
    expected = scipy.stats.norm.logpdf(sample, mean, sigma).mean()
    np.testing.assert_allclose(log_prob(sample, Gaussian(mean, jnp.float32(sigma))), expected, rtol=1e-4)
