"""The scheduler file that any solver of diffusers saves, against what diffusers makes of it, by number."""

import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from spo_jax.diffusion.ddim import sample
from spo_jax.diffusion.dpm_solver import make_dpm_schedule, sample_dpmpp_2m
from spo_jax.diffusion.process import Gaussian, log_prob
from spo_jax.diffusion.schedule import check_trainable, make_schedule
from spo_jax.errors import UserError
from spo_jax.formats.pipeline_files import scheduler_of

SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# What this solver saves; it needs a package that is not installed.
DPM_SDE = SD | {"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": None, "use_karras_sigmas": False}
ZERO_SNR = SD | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def solvers():
    """Schedulers of the installed diffusers that are made from betas."""
    classes = (getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler"))
    return [c for c in classes if "beta_start" in inspect.signature(c.__init__).parameters]


def saved(scheduler, folder):
    scheduler.save_config(folder)
    return json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def their_trajectory(scheduler, steps, network, latents):
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(latents)
    for t in scheduler.timesteps[:steps]:
        latents = scheduler.step(latents @ torch.from_numpy(network), t, latents).prev_sample
    return latents.numpy()


def compare(config, steps=7):
    """Alphas, timesteps and a trajectory with a linear network, of both our solvers and those of diffusers."""
    network, latents = noise(0, 4, 4) / 4, noise(1, 2, 3, 3, 4)
    for theirs, make, run in (
        (DDIMScheduler, make_schedule, sample),
        (DPMSolverMultistepScheduler, make_dpm_schedule, sample_dpmpp_2m),
    ):
        fixed = {} if theirs is DDIMScheduler else dict(algorithm_type="dpmsolver++", solver_order=2)
        theirs = theirs.from_config(config, **(fixed and fixed | {"solver_type": "midpoint"}))
        ours = make(config, steps)
        expected = their_trajectory(theirs, steps, network, latents)
        np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy()[:steps])
        np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=3e-4, atol=1e-7)
        found = run(lambda x, t: x @ network, ours, latents)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-4 * np.abs(expected).max(), err_msg=str(theirs))


@pytest.mark.parametrize("solver", solvers(), ids=lambda c: c.__name__)
def test_the_file_of_any_solver_gives_the_schedule_that_diffusers_makes_of_it(solver, tmp_path):
    config = saved(solver.from_config(SD), tmp_path)
    # Not of Stable Diffusion: CogVideoX moves the alphas, RePaint's solver adds noise.
    for foreign in {"snr_shift_scale", "eta"} & config.keys():
        with pytest.raises(UserError, match=foreign):
            make_schedule(config, 7)
        return
    compare(config)


@pytest.mark.parametrize(
    "change",
    [
        {"set_alpha_to_one": True},
        {"set_alpha_to_one": True, "timestep_spacing": "trailing"},
        {"set_alpha_to_one": True, "timestep_spacing": "linspace", "prediction_type": "v_prediction"},
        {"set_alpha_to_one": None},
        {"timestep_spacing": "trailing"},
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.4, "prediction_type": "sample"},
        {"trained_betas": np.linspace(1e-4, 0.02, 1000).tolist()},
        {"use_wobble": False, "wobble_schedule": None},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ZERO_SNR,
        ZERO_SNR | {"prediction_type": "sample"},
        {"lambda_min_clipped": -5.1},
        DPM_SDE,
    ],
    ids=str,
)
def test_fields_that_change_the_result_do_what_they_do_in_diffusers(change):
    compare(SD | change)


@pytest.mark.parametrize("steps", [6, 20, 60])
def test_without_a_word_the_last_step_goes_to_no_noise_as_in_diffusers(steps):
    """60 trailing steps end at timestep 16 and go to 0 from there, whatever ``set_alpha_to_one`` says."""
    for spacing in ("leading", "trailing"):
        config = {k: v for k, v in SD.items() if k != "set_alpha_to_one"} | {"timestep_spacing": spacing}
        compare(config, steps)


def test_training_keeps_the_noise_of_the_last_step_where_pictures_lose_it():
    clean, noisy = (make_schedule(SD | {"set_alpha_to_one": one}, 20) for one in (True, False))
    check_trainable(clean)
    for name in ("alphas_cumprod", "timesteps", "previous_timesteps"):
        np.testing.assert_array_equal(getattr(clean, name), getattr(noisy, name))


def test_a_file_of_sdxl_without_a_word_on_clipping_is_not_clipped_and_says_so(capsys):
    """As scripts write it that make a folder of a single file."""
    config = {k: v for k, v in SD.items() if k != "clip_sample"}
    assert make_schedule(scheduler_of(config, "a/scheduler_config.json", sdxl=True), 7).clip_sample_range is None
    assert "File a/scheduler_config.json has no clip_sample" in capsys.readouterr().err
    clipped = scheduler_of(SD | {"clip_sample": True, "steps_offset": 0}, "b/scheduler_config.json", sdxl=True)
    assert make_schedule(clipped, 7).clip_sample_range == 1.0 and clipped["steps_offset"] == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_zero_snr_schedule_has_finite_log_probabilities_and_gradients(kind, spacing):
    schedule = make_schedule(ZERO_SNR | {"prediction_type": kind, "timestep_spacing": spacing}, 20)
    check_trainable(schedule)
    latents, output, step_noise = noise(0, 3, 4, 4, 4)

    def of_step(output, t, previous):
        x0, eps = schedule.to_x0_and_noise(output, latents, t)
        mean, sigma = schedule.transition(x0, eps, t, previous, 1.0)
        return log_prob(mean + sigma * step_noise + 0.01, Gaussian(mean, sigma)), sigma

    steps = schedule.timesteps, schedule.previous_timesteps
    (value, sigma), gradient = jax.vmap(jax.value_and_grad(of_step, has_aux=True), (None, 0, 0))(
        jnp.asarray(output), *steps
    )
    assert np.isfinite(value).all() and np.isfinite(gradient).all() and (sigma > 0).all()
    every = jnp.arange(1000)  # a preference model is trained at all of them
    x0, eps = jax.vmap(lambda t: schedule.to_x0_and_noise(output, latents, t))(every)
    assert np.isfinite(x0).all() and np.isfinite(eps).all()


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5, "rho": 7.0},
        {"_class_name": "EDMDPMSolverMultistepScheduler", "solver_order": 2},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000},
        {"_class_name": "IPNDMScheduler", "trained_betas": None},
        # As diffusers saves them when they were made from the config of another one.
        SD | {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
        SD | {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5},
        {"_class_name": "UnCLIPScheduler", "variance_type": "fixed_small_log"},
    ],
)
def test_another_kind_of_noise_is_refused_by_its_class(config):
    for make in (make_schedule, make_dpm_schedule):
        with pytest.raises(UserError, match=config["_class_name"]):
            make(config, 20)


@pytest.mark.parametrize(
    "change",
    [
        *({f"use_{kind}": True} for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "flow_sigmas")),
        {"use_lu_lambdas": True},
        {"final_sigmas_type": "sigma_min"},
        {"variance_type": "learned_range"},
        {"lambda_min_clipped": -1.0},
    ],
    ids=str,
)
def test_what_only_dpm_solver_takes_is_refused_there_and_left_out_by_ddim(change):
    with pytest.raises(UserError, match=f"{next(iter(change))} = "):
        make_dpm_schedule(SD | change, 7)
    theirs = DDIMScheduler.from_config(SD | change)
    network, latents = noise(0, 4, 4) / 4, noise(1, 2, 3, 3, 4)
    found = sample(lambda x, t: x @ network, make_schedule(SD | change, 7), latents)
    np.testing.assert_allclose(found, their_trajectory(theirs, 7, network, latents), atol=1e-4, rtol=1e-4)
