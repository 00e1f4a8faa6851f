"""The plain sampler: one trajectory a prompt, for pictures and for evaluation."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.diffusion.schedule import Schedule, to_the_end


def sample(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    initial: Float[Array, "b h w c"],
    noise: Float[Array, "n b h w c"] | None = None,
    *,
    eta: float = 0.0,
) -> Float[Array, "b h w c"]:
    """Final latents of DDIM.

    Args:
      predict: ``(latents [B, h, w, c], timestep scalar) -> model output [B, h, w, c]``.
      schedule: its N timesteps are walked through, to no noise at all where ``ends_clean`` says so.
      initial: x_T.
      noise: the noise of each step; may be left out when ``eta`` is 0.
      eta: 0 for deterministic DDIM.

    Raises:
      ValueError: ``eta`` is positive but there is no noise.
    """
    if eta > 0 and noise is None:
        raise ValueError("eta > 0 needs the noise of every step.")

    schedule = to_the_end(schedule)

    def step(latents, inputs):
        timestep, previous, step_noise = inputs
        x0, eps = schedule.to_x0_and_noise(predict(latents, timestep), latents, timestep)
        drawn = schedule.transition(x0, eps, timestep, previous, eta)
        return (drawn.mean if step_noise is None else drawn.mean + drawn.sigma * step_noise), None

    steps = (schedule.timesteps, schedule.previous_timesteps, noise)
    return jax.lax.scan(step, initial.astype(jnp.float32), steps)[0]
