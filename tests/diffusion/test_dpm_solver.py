"""DPM-Solver++ 2M against diffusers, step by step; what it promises; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.diffusion.dpm_solver import (
    dpmpp_2m_coefficients,
    dpmpp_2m_step,
    make_dpm_schedule,
    sample_dpmpp_2m,
)
from spo_jax.diffusion.schedule import PREDICTION_TYPES
from spo_jax.errors import UserError

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
CONFIGS = st.fixed_dictionaries(
    {
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "prediction_type": st.sampled_from(PREDICTION_TYPES),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear"]),
        "steps_offset": st.integers(0, 1),
    }
)
# Of these diffusers makes no step too many with the spacing "trailing"; below and above 15, where it changes its order.
NUM_STEPS = st.sampled_from([1, 2, 3, 4, 5, 8, 10, 14, 15, 16, 20, 25, 50])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def theirs_for(config, ours, num_steps):
    """diffusers' scheduler, on our alphas: it multiplies them up in float32, we in float64."""
    theirs = DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint", **config)
    theirs.alphas_cumprod = torch.from_numpy(np.array(ours.alphas_cumprod))
    theirs.set_timesteps(num_steps)
    return theirs


@given(config=CONFIGS, num_steps=NUM_STEPS, seed=st.integers(0, 1000))
def test_every_step_is_that_of_diffusers(config, num_steps, seed):
    """With a fixed linear network, so that an error of one step reaches all later ones."""
    config = CONFIG | config
    schedule = make_dpm_schedule(config, num_steps)
    theirs = theirs_for(config, schedule, num_steps)
    np.testing.assert_array_equal(schedule.timesteps, theirs.timesteps.numpy())
    coefficients = dpmpp_2m_coefficients(schedule)
    network, latents = normal(seed, 6, 6) / 6, normal(seed + 1, 5, 6)
    expected, previous_x0 = torch.from_numpy(latents), np.zeros_like(latents)
    for i, t in enumerate(schedule.timesteps):
        expected = theirs.step(expected @ torch.from_numpy(network), theirs.timesteps[i], expected).prev_sample
        x0, _ = schedule.to_x0_and_noise(jnp.asarray(latents @ network), jnp.asarray(latents), t)
        latents = np.asarray(dpmpp_2m_step(jax.tree.map(lambda c, i=i: c[i], coefficients), latents, x0, previous_x0))
        previous_x0 = x0
        scale = max(1.0, float(np.abs(x0).max()))
        np.testing.assert_allclose(latents, expected.numpy(), rtol=0, atol=1e-5 * scale, err_msg=f"step {i}")


@pytest.mark.parametrize("num_steps", [1, 7, 20])
def test_the_sampler_takes_these_steps(num_steps):
    schedule = make_dpm_schedule(CONFIG, num_steps)
    theirs = theirs_for(CONFIG, schedule, num_steps)
    network, latents = normal(0, 4, 4) / 4, normal(1, 2, 3, 3, 4)
    ours = jax.jit(lambda x: sample_dpmpp_2m(lambda x, t: x @ network, schedule, x))(latents)
    expected = torch.from_numpy(latents)
    for t in theirs.timesteps:
        expected = theirs.step(expected @ torch.from_numpy(network), t, expected).prev_sample
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert ours.dtype == jnp.float32


@pytest.mark.parametrize("spacing", [{}, {"timestep_spacing": "leading"}, {"timestep_spacing": "trailing"}])
def test_the_scheduler_of_a_pipeline_is_exchanged_as_diffusers_does_it(spacing):
    """SD1.5's config names no spacing, and then each solver has its own."""
    config = CONFIG | {"skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False} | spacing
    theirs = DPMSolverMultistepScheduler.from_config(PNDMScheduler.from_config(config).config)
    theirs.set_timesteps(20)
    ours = make_dpm_schedule(config, 20)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-4)


@given(config=CONFIGS, num_steps=st.integers(1, 60), seed=st.integers(0, 1000))
def test_a_perfect_network_is_followed_to_its_picture_exactly(config, num_steps, seed):
    """The last step goes all the way, whatever the start, the spacing and the number of steps."""
    schedule = make_dpm_schedule(CONFIG | config, num_steps)
    assert schedule.num_steps == num_steps and (np.diff(schedule.timesteps) < 0).all()
    x0 = jnp.asarray(normal(seed, 1, 2, 2, 1))

    def predict(latents, t):
        a = schedule.alphas_cumprod[t]
        eps = (latents - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        v = jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x0
        return {"epsilon": eps, "v_prediction": v, "sample": x0}[schedule.prediction_type]

    final = sample_dpmpp_2m(predict, schedule, jnp.asarray(normal(seed + 1, 1, 2, 2, 1)))
    np.testing.assert_allclose(final, x0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_steps", [6, 10, 20])
def test_the_second_order_halves_the_steps(num_steps):
    """For Gaussian data the best network is linear and the exact way known; without its slope the solver is DDIM."""
    deviation = 0.5

    def error(num_steps, second_order):
        schedule = make_dpm_schedule(CONFIG, num_steps)
        coefficients = dpmpp_2m_coefficients(schedule)
        variances = schedule.alphas_cumprod * deviation**2 + 1 - schedule.alphas_cumprod
        latents, previous_x0, errors = jnp.ones(1), jnp.zeros(1), []
        for i, t in enumerate(schedule.timesteps[:-1]):
            prediction = latents * jnp.sqrt(1 - schedule.alphas_cumprod[t]) / variances[t]
            x0, _ = schedule.to_x0_and_noise(prediction, latents, t)
            now = jax.tree.map(lambda c, i=i: c[i], coefficients)
            now = now if second_order else now.replace(slope=0.0)
            latents, previous_x0 = dpmpp_2m_step(now, latents, x0, previous_x0), x0
            exact = jnp.sqrt(variances[schedule.timesteps[i + 1]] / variances[schedule.timesteps[0]])
            errors.append(abs(float(latents[0] - exact)))
        return max(errors)

    assert error(num_steps, True) < error(2 * num_steps, False)


@pytest.mark.parametrize(
    "change, num_steps, word",
    [
        ({"use_karras_sigmas": True}, 20, "use_karras_sigmas"),
        ({"final_sigmas_type": "sigma_min"}, 20, "sigma_min"),
        ({"timestep_spacing": "log"}, 20, "timestep_spacing"),
        ({}, 0, "between 1 and 999"),
        ({}, 1000, "between 1 and 999"),
    ],
)
def test_what_is_another_solver_is_refused(change, num_steps, word):
    with pytest.raises(UserError, match=word):
        make_dpm_schedule(CONFIG | change, num_steps)
