"""Noise schedules, from the fields of diffusers' ``scheduler_config.json`` (ALGORITHM: the paper's section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_SPACINGS = ("leading", "trailing", "linspace")
# Fields that other samplers read, or that only matter together with a field that is refused.
_INERT = [
    "set_alpha_to_one",
    "clip_sample_range",
    "sample_max_value",
    "dynamic_thresholding_ratio",
    "skip_prk_steps",
    "interpolation_type",
    "use_karras_sigmas",
    "variance_type",
    "sigma_min",
    "sigma_max",
    "timestep_type",
    "final_sigmas_type",
]


@flax.struct.dataclass
class Schedule:
    """Timesteps of N sampling steps and the noise level of every training timestep.

    Attributes:
      alphas_cumprod: float32 [T].
      timesteps: int32 [N], descending.
      previous_timesteps: int32 [N], where each step goes; clamped to [0, T - 1], so that the last step keeps a positive
        sigma and a finite log-probability.
      prediction_type: what the network predicts: "epsilon", "v_prediction" or "sample".
    """

    alphas_cumprod: jax.Array
    timesteps: jax.Array
    previous_timesteps: jax.Array
    prediction_type: str = flax.struct.field(pytree_node=False)

    @property
    def num_steps(self) -> int:
        """N."""
        return self.timesteps.shape[0]


def make_schedule(config: Mapping[str, Any], num_steps: int) -> Schedule:
    """The schedule of a checkpoint at ``num_steps`` sampling steps.

    Raises:
      UserError: a field or value that is not implemented, or more steps than training timesteps.
    """
    fields = dict(config)
    for name in [n for n in fields if n.startswith("_") or n in _INERT]:
        del fields[name]
    num_train = fields.pop("num_train_timesteps", 1000)
    betas = _betas(
        fields.pop("beta_schedule", "linear"),
        fields.pop("beta_start", 1e-4),
        fields.pop("beta_end", 0.02),
        num_train,
    )
    timesteps = _timesteps(
        fields.pop("timestep_spacing", "leading"), fields.pop("steps_offset", 0), num_train, num_steps
    )
    prediction_type = _one_of("prediction_type", fields.pop("prediction_type", "epsilon"), PREDICTION_TYPES)
    for name, allowed in (
        ("clip_sample", False),
        ("thresholding", False),
        ("rescale_betas_zero_snr", False),
        ("trained_betas", None),
    ):
        _one_of(name, fields.pop(name, allowed), (allowed,))
    if fields:
        raise UserError(f"Scheduler config: the field {sorted(fields)[0]!r} is not known to this version.")
    previous = np.clip(timesteps - num_train // num_steps, 0, num_train - 1)
    return Schedule(
        alphas_cumprod=jnp.asarray(np.cumprod(1.0 - betas, dtype=np.float64), jnp.float32),
        timesteps=jnp.asarray(timesteps, jnp.int32),
        previous_timesteps=jnp.asarray(previous, jnp.int32),
        prediction_type=prediction_type,
    )


def check_trainable(schedule: Schedule) -> None:
    """Raises UserError if a step has no noise, because its log-probability, which SPO learns from, is not finite."""
    stuck = np.asarray(schedule.timesteps) == np.asarray(schedule.previous_timesteps)
    if stuck.any():
        raise UserError(
            f"Scheduler config: {schedule.num_steps} sampling steps end at {int(schedule.timesteps[-1])}, where "
            "no noise is left to take away and nothing can be learned; set steps_offset to 1 in scheduler_config.json "
            "(timestep_spacing leading), or use timestep_spacing trailing."
        )


def _betas(kind: str, start: float, end: float, count: int) -> np.ndarray:
    _one_of("beta_schedule", kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    grid = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - grid[1:] / grid[:-1], 0.999)


def _timesteps(spacing: str, offset: int, num_train: int, num_steps: int) -> np.ndarray:
    _one_of("timestep_spacing", spacing, _SPACINGS)
    if not 1 <= num_steps <= num_train:
        raise UserError(f"The number of sampling steps must be between 1 and {num_train}, not {num_steps}.")
    steps: np.ndarray
    if spacing == "linspace":
        steps = np.linspace(0, num_train - 1, num_steps).round()[::-1]
    elif spacing == "leading":
        steps = (np.arange(num_steps) * (num_train // num_steps))[::-1] + offset
    else:
        # Counting down in fractions ends, for some N (61 for example), one step too late, at timestep -1.
        steps = (np.round(np.arange(num_train, 0, -num_train / num_steps)) - 1)[:num_steps]
    if steps.max() >= num_train:
        raise UserError(
            f"{num_steps} sampling steps with steps_offset {offset} leave the {num_train} training timesteps."
        )
    return steps.astype(np.int32)


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        options = " or ".join(repr(a) for a in allowed)
        raise UserError(f"Scheduler config: {name} = {value!r} is not supported (only {options}).")
    return value
