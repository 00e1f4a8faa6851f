"""DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), deterministic: one order more exact than DDIM.

Between two timesteps the solver integrates the predicted x0 exactly in lambda = log(signal / spread), and takes the x0
of the step before for its slope ("midpoint"). The first step has no step before, and the last one goes to lambda =
infinity, where only x0 itself is left: both are of first order. Everything is float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spo_jax.diffusion.schedule import Schedule, make_schedule, scheduler_file
from spo_jax.errors import UserError

# Fields of a scheduler config that DDIM leaves out and that would make this solver another one, with the values that
# do not. Order, algorithm and type of the solver are those that its name says, whatever the config has.
_OTHER_SIGMAS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas", "flow_sigmas")
_FIXED: dict[str, tuple[Any, ...]] = {f"use_{name}": (False, None) for name in _OTHER_SIGMAS}
_FIXED |= {"final_sigmas_type": ("zero", None)}
# diffusers' place of the last timestep of a schedule with zero terminal SNR, where lambda would be minus infinity.
_ALMOST_ZERO = 2.0**-24


def make_dpm_schedule(config: Mapping[str, Any], num_steps: int) -> Schedule:
    """The schedule of a checkpoint at ``num_steps`` steps of DPM-Solver++, as diffusers spaces them.

    The way ends at no noise at all, which is a place of its own: with the spacings "leading" and "linspace" the
    timesteps are those of DDIM with one step more, without the last. A config that names no spacing, such as that of
    SD1.5, has "linspace" with this solver, "leading" with DDIM.

    Raises:
      UserError: as ``make_schedule``, or a config for another solver.
    """
    file = scheduler_file(config)
    config = {"timestep_spacing": "linspace"} | {k: v for k, v in config.items() if v is not None}
    for name, allowed in _FIXED.items():
        if config.get(name, allowed[0]) not in allowed:
            raise UserError(f"{file}: {name} = {config[name]!r} is not supported by --solver=dpmpp_2m.")
    if str(config.get("variance_type")).startswith("learned"):
        raise UserError(f"{file}: variance_type = {config['variance_type']!r} is not supported by --solver=dpmpp_2m.")
    num_train = config.get("num_train_timesteps", 1000)
    if isinstance(num_train, int) and not 1 <= num_steps < num_train:
        raise UserError(f"The number of DPM-Solver++ steps must be between 1 and {num_train - 1}, not {num_steps}.")
    more = 0 if config["timestep_spacing"] == "trailing" else 1
    schedule = make_schedule(config, num_steps + more)
    alphas_cumprod = schedule.alphas_cumprod
    if alphas_cumprod[-1] == 0:
        alphas_cumprod = alphas_cumprod.at[-1].set(_ALMOST_ZERO)
    # A limit that would leave out the noisiest timesteps.
    limit, last = config.get("lambda_min_clipped", -math.inf), alphas_cumprod[-1]
    least = 0.5 * float(jnp.log(last) - jnp.log1p(-last))
    if limit > least:
        raise UserError(
            f"{file}: lambda_min_clipped = {limit!r} leaves out timesteps (the least lambda is {least:.2f}), which is "
            "not supported by --solver=dpmpp_2m."
        )
    timesteps = schedule.timesteps[:num_steps]
    return dataclasses.replace(
        schedule,
        alphas_cumprod=alphas_cumprod,
        timesteps=timesteps,
        previous_timesteps=jnp.append(timesteps[1:], 0),
        ends_clean=False,  # it always goes all the way
        clip_sample_range=None,
    )


@flax.struct.dataclass
class DPMCoefficients:
    """What a step needs to know of the schedule; see ``dpmpp_2m_step``. float32 scalars, or [N] for all steps."""

    keep: jax.Array
    gain: jax.Array
    slope: jax.Array


def dpmpp_2m_coefficients(schedule: Schedule) -> DPMCoefficients:
    """The coefficients of all N steps; the last one ends at signal 1, spread 0."""
    alphas = schedule.alphas_cumprod[schedule.timesteps]
    signal, spread = jnp.append(jnp.sqrt(alphas), 1.0), jnp.append(jnp.sqrt(1.0 - alphas), 0.0)
    log_snr = jnp.log(signal) - jnp.log(spread)
    h = log_snr[1:] - log_snr[:-1]
    # (1/2) h_i / h_{i-1}; steps of first order have none.
    slope = jnp.zeros_like(h).at[1:-1].set(0.5 * h[1:-1] / h[:-2])
    return DPMCoefficients(keep=spread[1:] / spread[:-1], gain=-signal[1:] * jnp.expm1(-h), slope=slope)


def dpmpp_2m_step(
    coefficients: DPMCoefficients,
    latents: Float[Array, "*l"],
    x0: Float[Array, "*l"],
    previous_x0: Float[Array, "*l"],
) -> Float[Array, "*l"]:
    """Latents at the next timestep, ``keep * latents + gain * (x0 + slope * (x0 - previous_x0))``."""
    return coefficients.keep * latents + coefficients.gain * (x0 + coefficients.slope * (x0 - previous_x0))


def sample_dpmpp_2m(
    predict: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    initial: Float[Array, "b h w c"],
) -> Float[Array, "b h w c"]:
    """Final latents of DPM-Solver++ 2M, one network call a step; as ``ddim.sample``, of ``make_dpm_schedule``."""

    def step(carry, inputs):
        latents, previous_x0 = carry
        timestep, coefficients = inputs
        x0, _ = schedule.to_x0_and_noise(predict(latents, timestep), latents, timestep)
        return (dpmpp_2m_step(coefficients, latents, x0, previous_x0), x0), None

    initial = initial.astype(jnp.float32)
    steps = (schedule.timesteps, dpmpp_2m_coefficients(schedule))
    return jax.lax.scan(step, (initial, jnp.zeros_like(initial)), steps)[0][0]
