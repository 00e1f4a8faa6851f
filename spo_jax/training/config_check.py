"""Values of a config that no run can use are refused by name, before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from spo_jax.errors import UserError
from spo_jax.training.judges import load_function
from spo_jax.training.optimizer import OPTIMIZERS, WARMUPS
from spo_jax.training.ranges import SPM_RANGES, SPO_RANGES, Range

WRITTEN_DTYPES = ("float32", "float16", "bfloat16")


def check_config(config: ConfigDict) -> None:
    """Refuses values that no run can use, by name; types and unknown keys are checked by ml_collections already."""
    _check_ranges(config, SPO_RANGES)
    sampling, num_pool_steps = config.sampling, config.sampling.num_steps - config.sampling.num_plain_steps
    rules = [
        ("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
        ("sampling.num_plain_steps", num_pool_steps > 0, "from 0 to num_steps - 1"),
        ("sampling.num_inner_steps", sampling.num_inner_steps < sampling.num_steps, "below num_steps"),
        ("sampling.continuation", sampling.continuation in ("random", "win"), "random or win"),
        ("lora.init", not (config.lora.init and config.lora.rank == 0), "empty where lora.rank is 0"),
        ("train.optimizer", config.train.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
    ]
    _refuse(config, rules)
    if config.scorer.fn:
        load_function(config.scorer.fn)


def check_spm_config(config: ConfigDict) -> None:
    """The same for the config of a preference model."""
    _check_ranges(config, SPM_RANGES)
    batch_size, timesteps = config.train.batch_size, config.timesteps
    rules = [
        ("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
        ("scorer.dtype", config.scorer.dtype in WRITTEN_DTYPES, " or ".join(WRITTEN_DTYPES)),
        ("chunk", config.chunk == 0 or batch_size % config.chunk == 0, "0 or a divisor of train.batch_size"),
        (
            "chunk",
            config.chunk == 0 or config.validation.batch_size % config.chunk == 0,
            "0 or a divisor of validation.batch_size",
        ),
        ("timesteps", len(timesteps) == 2 and timesteps[0] < timesteps[1], "two numbers, the second one larger"),
        ("train.warmup_steps", config.train.warmup_steps < config.num_steps, "from 0 to num_steps - 1"),
        ("train.warmup", config.train.warmup in WARMUPS, " or ".join(WARMUPS)),
        ("train.optimizer", config.train.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
        ("checkpoint.every", config.checkpoint.every % config.log_every == 0, "a multiple of log_every"),
        ("validation.every", config.validation.every % config.log_every == 0, "a multiple of log_every"),
        ("validation.timesteps", len(config.validation.timesteps) > 0, "at least one timestep"),
    ]
    _refuse(config, rules)


def _check_ranges(config: ConfigDict, ranges: Mapping[str, Range]) -> None:
    for name, allowed in ranges.items():
        value = _value(config, name)
        numbers = value if isinstance(value, tuple | list) else (value,)
        faults = [fault for number in numbers if (fault := allowed.fault(number))]
        if isinstance(value, tuple | list) and not all(isinstance(number, int) for number in numbers):
            faults.append("whole numbers")
        _refuse(config, [(name, False, fault) for fault in faults])


def _refuse(config: ConfigDict, rules: list[tuple[str, bool, str]]) -> None:
    for name, holds, requirement in rules:
        if not holds:
            value = _value(config, name)
            raise UserError(
                f"config.{name} must be {requirement}, not {value!r}; see the config file for what it means."
            )


def _value(config: ConfigDict, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value[part]
    return value
