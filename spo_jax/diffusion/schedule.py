"""Noise schedules, from the fields of diffusers' ``scheduler_config.json`` (ALGORITHM: the paper's section 3.1).

Any of diffusers' solvers may have saved a pipeline's file; it is read as ``DDIMScheduler.from_config`` reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from spo_jax.diffusion.process import Gaussian
from spo_jax.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Where ``formats/pipeline.py`` notes the file that a config was read from, for messages; as diffusers' own
# metadata, names that start with "_" are no fields.
FILE = "_file"
_SPACINGS = ("leading", "trailing", "linspace")
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Solvers whose noise is that of DDIM, so that a config of theirs may leave out how its betas are made.
_SOLVERS = (
    *("DDIM", "DDIMParallel", "DDIMInverse", "DDPM", "DDPMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete"),
    *("EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep"),
    *("DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep"),
    *("SASolver", "LCM", "TCD"),
)
# How names of schedulers of other kinds of noise begin; they may still carry the betas of the one they were made from.
_OTHER_NOISE = ("EDM", "FlowMatch", "FlowMap", "ScoreSde", "KarrasVe", "CMStochastic", "Consistency", "SCM")
# Fields that diffusers leaves out when it makes a DDIM scheduler from the config of another solver; and those that only
# matter together with ``thresholding``, which is refused.
_OF_OTHER_SOLVERS = (
    *("algorithm_type", "corrector_order", "disable_corrector", "dynamic_thresholding_ratio"),
    *("euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped"),
    *("lower_order_final", "noise_sampler_seed", "original_inference_steps", "predict_x0", "predictor_order"),
    *("sample_max_value", "shift_terminal", "sigma_max", "sigma_min", "skip_prk_steps", "solver_order"),
    *("solver_p", "solver_type", "tau_func", "time_shift_type", "timestep_scaling", "timestep_type"),
    *("use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_flow_sigmas"),
    *("use_karras_sigmas", "use_lu_lambdas", "variance_type"),
)


@flax.struct.dataclass
class Schedule:
    """Timesteps of N sampling steps and the noise level of every training timestep."""

    alphas_cumprod: jax.Array  # float32 [T]; 0 at the last one of a schedule with zero terminal SNR
    timesteps: jax.Array  # int32 [N], descending
    # int32 [N], where each step goes; clamped to [0, T - 1], so that the last step keeps a positive sigma and a finite
    # log-probability.
    previous_timesteps: jax.Array
    prediction_type: str = flax.struct.field(pytree_node=False)  # "epsilon", "v_prediction" or "sample"
    ends_clean: bool = flax.struct.field(pytree_node=False, default=False)  # set_alpha_to_one: see to_the_end
    # Predictions of x0 are clipped to +- this; None leaves them as they are.
    clip_sample_range: float | None = flax.struct.field(pytree_node=False, default=None)
    file: str = flax.struct.field(pytree_node=False, default="Scheduler config")  # that messages name

    @property
    def num_steps(self) -> int:
        """N."""
        return self.timesteps.shape[0]

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def add_noise(
        self, clean: Float[Array, "*l"], noise: Float[Array, "*#l"], timestep: Int[Array, ""]
    ) -> Float[Array, "*l"]:
        """``sqrt(alpha) clean + sqrt(1 - alpha) noise`` (arXiv 2006.11239, equation 4)."""
        alpha = self.alphas_cumprod[timestep]
        return jnp.sqrt(alpha) * clean + jnp.sqrt(1.0 - alpha) * noise

    def to_x0_and_noise(
        self, output: Float[Array, "*l"], latents: Float[Array, "*l"], timestep: Int[Array, ""]
    ) -> tuple[Float[Array, "*l"], Float[Array, "*l"]]:
        """The clean latents and the noise that a model output stands for, by ``prediction_type``."""
        alpha = self.alphas_cumprod[timestep]
        signal, spread = jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)
        output, latents = output.astype(jnp.float32), latents.astype(jnp.float32)
        if self.prediction_type == "epsilon":
            x0, noise = (latents - spread * output) / signal, output
        elif self.prediction_type == "v_prediction":
            x0, noise = signal * latents - spread * output, signal * output + spread * latents
        else:
            x0, noise = output, (latents - signal * output) / spread
        if self.clip_sample_range is not None:  # diffusers clips x0 alone; the noise stays
            x0 = jnp.clip(x0, -self.clip_sample_range, self.clip_sample_range)
        return x0, noise

    def transition(
        self,
        x0: Float[Array, "*l"],
        noise: Float[Array, "*l"],
        timestep: Int[Array, ""],
        previous_timestep: Int[Array, ""],
        eta: float,
    ) -> Gaussian:
        """One step of DDIM (arXiv 2010.02502, equations 12 and 16); ``eta`` = 0 is deterministic, 1 is DDPM-like."""
        alpha, alpha_previous = self.alphas_cumprod[timestep], self.alphas_cumprod[previous_timestep]
        variance = (1.0 - alpha_previous) / (1.0 - alpha) * (1.0 - alpha / alpha_previous)
        sigma = eta * jnp.sqrt(variance)
        # With alpha = 0 and eta = 1 nothing is left of the noise, and rounding may leave less than that.
        direction = jnp.sqrt(jnp.maximum(1.0 - alpha_previous - sigma**2, 0.0))
        return Gaussian(jnp.sqrt(alpha_previous) * x0 + direction * noise, sigma)


def make_schedule(config: Mapping[str, Any], num_steps: int) -> Schedule:
    """The schedule of a checkpoint at ``num_steps`` sampling steps of DDIM.

    Where diffusers has a default for a field that is missing, it is the same one; only ``clip_sample`` is off then, as
    latents are not bounded (see ``formats/pipeline.py``).

    Raises:
      UserError: a field or value that is not implemented, or more steps than training timesteps; with the file's name.
    """
    file = scheduler_file(config)
    try:
        return _make_schedule(config, num_steps, file)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise UserError(f"{file}: its values make no noise schedule ({error}); download or copy it again.") from error


def scheduler_file(config: Mapping[str, Any]) -> str:
    """What messages about a scheduler's config begin with."""
    return f"File {config[FILE]}" if FILE in config else "Scheduler config"


def _make_schedule(config: Mapping[str, Any], num_steps: int, file: str) -> Schedule:
    name = str(config.get("_class_name", "DDIMScheduler"))
    described = config.get("beta_schedule") is not None or config.get("trained_betas") is not None
    if name.startswith(_OTHER_NOISE) or not (described or name.removesuffix("Scheduler") in _SOLVERS):
        raise UserError(
            f"_class_name = {name!r} is not supported: its noise schedule is not made from betas, as that of DDIM and "
            "DPM-Solver++ is; use a model that was trained with one (not EDM, not flow matching)."
        )
    off = {name for name, value in config.items() if value is None or value is False}
    fields = {k: v for k, v in config.items() if k not in off and k not in _OF_OTHER_SOLVERS and not k.startswith("_")}
    num_train = fields.pop("num_train_timesteps", 1000)
    if not isinstance(num_train, int) or num_train < 1:
        raise UserError(f"num_train_timesteps = {num_train!r} must be a whole number from 1.")
    prediction_type = _one_of("prediction_type", fields.pop("prediction_type", "epsilon"), PREDICTION_TYPES)
    alphas_cumprod = _alphas_cumprod(fields, num_train)
    if prediction_type == "epsilon" and alphas_cumprod[-1] == 0:
        raise UserError(
            "rescale_betas_zero_snr = True (or a last beta of 1) leaves no signal at the last timestep, where "
            "prediction_type = 'epsilon' divides by it; such a model predicts v: set prediction_type to 'v_prediction'."
        )
    spacing, offset = fields.pop("timestep_spacing", "leading"), fields.pop("steps_offset", 0)
    timesteps = _timesteps(spacing, offset, num_train, num_steps)
    clip_sample_range, clips = fields.pop("clip_sample_range", 1.0), fields.pop("clip_sample", False)
    fields.pop("set_alpha_to_one", None)
    _one_of("thresholding", fields.pop("thresholding", False), (False,))
    if fields:
        name = min(fields)
        raise UserError(
            f"the field {name!r} (= {fields[name]!r}) is not known to this version; it is refused because ignoring it "
            "could change the noise schedule."
        )
    previous = timesteps - num_train // num_steps
    return Schedule(
        alphas_cumprod=jnp.asarray(alphas_cumprod, jnp.float32),
        timesteps=jnp.asarray(timesteps, jnp.int32),
        previous_timesteps=jnp.asarray(np.clip(previous, 0, num_train - 1), jnp.int32),
        prediction_type=prediction_type,
        ends_clean=bool(config.get("set_alpha_to_one", True) and previous[-1] < 0),
        clip_sample_range=float(clip_sample_range) if clips else None,
        file=file,
    )


def to_the_end(schedule: Schedule) -> Schedule:
    """The schedule for pictures: with ``set_alpha_to_one`` the last step goes to no noise at all, as in diffusers.

    Training keeps to ``previous_timesteps`` as they are: a step without noise has no log-probability.
    """
    if not schedule.ends_clean:
        return schedule
    num_train = schedule.num_train_timesteps
    return dataclasses.replace(
        schedule,
        alphas_cumprod=jnp.append(schedule.alphas_cumprod, 1.0),
        previous_timesteps=schedule.previous_timesteps.at[-1].set(num_train),
        ends_clean=False,
    )


def check_trainable(schedule: Schedule) -> None:
    """Raises UserError if a step has no noise, because its log-probability, which SPO learns from, is not finite."""
    stuck = np.asarray(schedule.timesteps) == np.asarray(schedule.previous_timesteps)
    if stuck.any():
        raise UserError(
            f"{schedule.file}: {schedule.num_steps} sampling steps end at {int(schedule.timesteps[-1])}, where "
            "no noise is left to take away and nothing can be learned; set steps_offset to 1 there "
            "(timestep_spacing leading), or use timestep_spacing trailing."
        )


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """The value of a field, if it is one of those that are supported."""
    if value not in allowed:
        raise UserError(f"{name} = {value!r} is not supported (only {' or '.join(map(repr, allowed))}).")
    return value


def _alphas_cumprod(fields: dict[str, Any], count: int) -> np.ndarray:
    """float64 [count]; takes what it reads out of ``fields``."""
    kind = fields.pop("beta_schedule", "linear")
    start, end = fields.pop("beta_start", 1e-4), fields.pop("beta_end", 0.02)
    if (trained := fields.pop("trained_betas", None)) is not None:
        betas = np.asarray(trained, np.float64)
        if betas.shape != (count,):
            raise UserError(f"trained_betas has the shape {betas.shape}, but num_train_timesteps is {count}.")
    else:
        betas = _betas(kind, start, end, count)
    # The last one may be 1: no signal is left then.
    if not ((betas >= 0) & (betas <= 1)).all() or not (betas[:-1] < 1).all():
        raise UserError("its betas (beta_start, beta_end or trained_betas) must lie between 0 and 1.")
    alphas_cumprod = np.cumprod(1.0 - betas, dtype=np.float64)
    if not fields.pop("rescale_betas_zero_snr", False):
        return alphas_cumprod
    # arXiv 2305.08891, algorithm 1: the last signal becomes 0, the first stays.
    signal = np.sqrt(alphas_cumprod)
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2


def _betas(kind: str, start: float, end: float, count: int) -> np.ndarray:
    _one_of("beta_schedule", kind, _BETA_SCHEDULES)
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    grid = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1.0 - grid[1:] / grid[:-1], 0.999)


def _timesteps(spacing: str, offset: int, num_train: int, num_steps: int) -> np.ndarray:
    _one_of("timestep_spacing", spacing, _SPACINGS)
    if not 1 <= num_steps <= num_train:
        raise UserError(f"the number of sampling steps must be between 1 and {num_train}, not {num_steps}.")
    steps: np.ndarray
    if spacing == "linspace":
        steps = np.linspace(0, num_train - 1, num_steps).round()[::-1]
    elif spacing == "leading":
        steps = (np.arange(num_steps) * (num_train // num_steps))[::-1] + offset
    else:
        # Counting down in fractions ends, for some N (61 for example), one step too late, at timestep -1.
        steps = (np.round(np.arange(num_train, 0, -num_train / num_steps)) - 1)[:num_steps]
    if steps.max() >= num_train or steps.min() < 0:
        raise UserError(
            f"{num_steps} sampling steps with steps_offset {offset} leave the {num_train} training timesteps."
        )
    return steps.astype(np.int32)
