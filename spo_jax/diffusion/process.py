"""One DDIM step (arXiv 2010.02502, equations 12 and 16) as a Gaussian, and the log-probability under it.

Written for one latent of any shape; callers ``vmap``. Everything is float32: sigma is small near t = 0 and the
difference of two log-probabilities smaller still.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spo_jax.diffusion.schedule import Schedule


def predict_x0_and_noise(
    schedule: Schedule, model_output: Float[Array, "*l"], latents: Float[Array, "*l"], timestep: Int[Array, ""]
) -> tuple[Float[Array, "*l"], Float[Array, "*l"]]:
    """The clean latents and the noise that a model output stands for, by the schedule's prediction type."""
    alpha = schedule.alphas_cumprod[timestep]
    signal, spread = jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)
    output, latents = model_output.astype(jnp.float32), latents.astype(jnp.float32)
    if schedule.prediction_type == "epsilon":
        x0, noise = (latents - spread * output) / signal, output
    elif schedule.prediction_type == "v_prediction":
        x0, noise = signal * latents - spread * output, signal * output + spread * latents
    else:
        x0, noise = output, (latents - signal * output) / spread
    if schedule.clip_sample_range is not None:  # diffusers clips x0 alone; the noise stays
        x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
    return x0, noise


def ddim_distribution(
    schedule: Schedule,
    x0: Float[Array, "*l"],
    noise_prediction: Float[Array, "*l"],
    timestep: Int[Array, ""],
    previous_timestep: Int[Array, ""],
    eta: float,
) -> tuple[Float[Array, "*l"], Float[Array, ""]]:
    """Mean and standard deviation of x at ``previous_timestep``; ``eta`` = 0 is deterministic, 1 is DDPM-like."""
    alpha, alpha_previous = schedule.alphas_cumprod[timestep], schedule.alphas_cumprod[previous_timestep]
    variance = (1.0 - alpha_previous) / (1.0 - alpha) * (1.0 - alpha / alpha_previous)
    sigma = eta * jnp.sqrt(variance)
    # With alpha = 0 and eta = 1 nothing is left of the noise, and rounding may leave less than that.
    direction = jnp.sqrt(jnp.maximum(1.0 - alpha_previous - sigma**2, 0.0))
    mean = jnp.sqrt(alpha_previous) * x0 + direction * noise_prediction
    return mean, sigma


def log_prob(sample: Float[Array, "*l"], mean: Float[Array, "*l"], sigma: Float[Array, ""]) -> Float[Array, ""]:
    """Gaussian log-density, MEAN over the elements (not the sum: the loss's beta is meant for the mean)."""
    squared = jnp.square(sample.astype(jnp.float32) - mean).mean()
    return -squared / (2.0 * sigma**2) - jnp.log(sigma) - 0.5 * math.log(2.0 * math.pi)
