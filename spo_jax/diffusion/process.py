"""What sampling and losses ask of a diffusion process; ``schedule.py`` has the one of Stable Diffusion.

Written for one latent of any shape; callers ``vmap``. Everything is float32: sigma is small near t = 0 and the
difference of two log-probabilities is smaller still.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Gaussian(NamedTuple):
    """A step of the reverse process: mean [*l] and standard deviation [], both float32."""

    mean: jax.Array
    sigma: jax.Array


class Process(Protocol):
    """A diffusion process and the N timesteps at which it is sampled; only this knows what a noise level is."""

    @property
    def timesteps(self) -> Int[Array, " n"]:
        """Descending."""

    @property
    def previous_timesteps(self) -> Int[Array, " n"]:
        """Where each step goes; a step to there has a positive sigma and a finite log-probability."""

    @property
    def num_steps(self) -> int:
        """N."""

    @property
    def num_train_timesteps(self) -> int:
        """T; the network knows the timesteps 0 to T - 1."""

    def add_noise(
        self, clean: Float[Array, "*l"], noise: Float[Array, "*#l"], timestep: Int[Array, ""]
    ) -> Float[Array, "*l"]:
        """``clean`` with noise at the level of ``timestep``."""

    def to_x0_and_noise(
        self, output: Float[Array, "*l"], latents: Float[Array, "*l"], timestep: Int[Array, ""]
    ) -> tuple[Float[Array, "*l"], Float[Array, "*l"]]:
        """The clean latents and the noise that a model output stands for."""

    def transition(
        self,
        x0: Float[Array, "*l"],
        noise: Float[Array, "*l"],
        timestep: Int[Array, ""],
        previous_timestep: Int[Array, ""],
        eta: float,
    ) -> Gaussian:
        """Distribution of the latents at ``previous_timestep``; ``eta`` = 0 is deterministic."""


def log_prob(sample: Float[Array, "*l"], step: Gaussian) -> Float[Array, ""]:
    """Gaussian log-density, MEAN over the elements (not the sum: the loss's beta is meant for the mean)."""
    squared = jnp.square(sample.astype(jnp.float32) - step.mean).mean()
    return -squared / (2.0 * step.sigma**2) - jnp.log(step.sigma) - 0.5 * math.log(2.0 * math.pi)
