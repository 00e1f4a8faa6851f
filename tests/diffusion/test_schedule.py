"""Random scheduler configs against diffusers; what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.diffusion.schedule import FILE, check_trainable, make_schedule
from spo_jax.errors import UserError

CONFIGS = st.fixed_dictionaries(
    {
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_start": st.floats(1e-4, 2e-3),
        "beta_end": st.floats(5e-3, 3e-2),
        "num_train_timesteps": st.sampled_from([100, 200, 1000]),
        "timestep_spacing": st.sampled_from(["leading", "linspace"]),
        "steps_offset": st.integers(0, 1),
    }
)


@given(config=CONFIGS, num_steps=st.integers(1, 60))
def test_any_schedule_is_that_of_diffusers(config, num_steps):
    theirs = DDIMScheduler(clip_sample=False, **config)
    theirs.set_timesteps(num_steps)
    ours = make_schedule(config, num_steps)
    # diffusers multiplies in float32, we in float64 and round once.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=3e-4, atol=1e-7)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    assert ours.num_steps == num_steps
    assert (np.diff(ours.alphas_cumprod) < 0).all()


@given(num_steps=st.sampled_from([1, 2, 5, 7, 10, 20, 25, 30, 50, 100, 250, 1000]))
def test_trailing_starts_at_the_last_training_timestep(num_steps):
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(num_steps)
    ours = make_schedule({"timestep_spacing": "trailing"}, num_steps)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    assert ours.timesteps[0] == 999


@given(num_train=st.sampled_from([100, 1000]), data=st.data())
def test_trailing_has_as_many_timesteps_as_asked_for(num_train, data):
    """Where diffusers, counting down in fractions, now and then adds a timestep -1."""
    num_steps = data.draw(st.integers(1, num_train))
    config = {"timestep_spacing": "trailing", "num_train_timesteps": num_train}
    timesteps = np.asarray(make_schedule(config, num_steps).timesteps)
    assert len(timesteps) == num_steps and timesteps[0] == num_train - 1 and timesteps[-1] >= 0
    assert (np.diff(timesteps) < 0).all()
    theirs = DDIMScheduler(**config)
    theirs.set_timesteps(num_steps)
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy()[:num_steps])


@pytest.mark.parametrize(
    "config, num_steps, trainable",
    [
        ({"steps_offset": 1}, 20, True),
        ({"steps_offset": 0}, 20, False),
        ({"timestep_spacing": "trailing"}, 61, True),
        ({"timestep_spacing": "linspace"}, 20, False),
    ],
)
def test_a_schedule_that_ends_without_noise_is_refused_for_training(config, num_steps, trainable):
    schedule = make_schedule(config, num_steps)
    if trainable:
        check_trainable(schedule)
    else:
        with pytest.raises(UserError, match="20 sampling steps end at 0"):
            check_trainable(schedule)


@given(config=CONFIGS, num_steps=st.integers(1, 60))
def test_every_step_goes_down_by_the_same_stride_and_stays_inside(config, num_steps):
    schedule = make_schedule(config, num_steps)
    stride = config["num_train_timesteps"] // num_steps
    expected = np.clip(np.asarray(schedule.timesteps) - stride, 0, config["num_train_timesteps"] - 1)
    np.testing.assert_array_equal(schedule.previous_timesteps, expected)
    assert schedule.timesteps.dtype == schedule.previous_timesteps.dtype == jnp.int32


@pytest.mark.parametrize(
    "change, words",
    [
        ({"thresholding": True}, ["thresholding", "True"]),
        ({"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr", "'epsilon'", "'v_prediction'"]),
        ({"trained_betas": [0.1]}, ["trained_betas", "(1,)", "1000"]),
        ({"trained_betas": [0.1] * 500 + [1.5] * 500}, ["trained_betas", "between 0 and 1"]),
        ({"beta_end": "0.02"}, ["no noise schedule"]),
        ({"num_train_timesteps": 0}, ["num_train_timesteps", "0"]),
        ({"beta_schedule": "sigmoid"}, ["beta_schedule", "'sigmoid'", "'scaled_linear'"]),
        ({"timestep_spacing": "log"}, ["timestep_spacing", "'log'", "'trailing'"]),
        ({"prediction_type": "flow"}, ["prediction_type", "'flow'", "'v_prediction'"]),
        ({"sigma_wobble": 1}, ["sigma_wobble", "1"]),
        ({"snr_shift_scale": 3.0}, ["snr_shift_scale", "3.0"]),
    ],
)
def test_refusal_names_field_value_and_what_is_possible(change, words):
    with pytest.raises(UserError) as caught:
        make_schedule({"steps_offset": 1} | change, 20)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(UserError, match=r"^File somewhere/scheduler_config\.json: "):
        make_schedule({"steps_offset": 1, FILE: "somewhere/scheduler_config.json"} | change, 20)


@pytest.mark.parametrize("num_steps, offset", [(0, 0), (-1, 0), (1001, 0), (1000, 1), (20, 50)])
def test_steps_that_do_not_fit_the_training_timesteps_are_refused(num_steps, offset):
    with pytest.raises(UserError, match=str(num_steps)):
        make_schedule({"steps_offset": offset}, num_steps)
