"""Values of a config that no run can use are refused by name, before anything starts."""

from __future__ import annotations

from ml_collections import ConfigDict

from spo_jax.errors import UserError
from spo_jax.training.judges import load_function
from spo_jax.training.optimizer import OPTIMIZERS

WRITTEN_DTYPES = ("float32", "float16", "bfloat16")


def check_config(config: ConfigDict) -> None:
    """Refuses values that no run can use, by name; types and unknown keys are checked by ml_collections already."""
    sampling = config.sampling
    rules = [
        ("prompts_per_batch", config.prompts_per_batch >= 1, "at least 1"),
        ("num_batches", config.num_batches >= 1, "at least 1"),
        ("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
        ("sampling.num_steps", sampling.num_steps >= 2, "at least 2"),
        ("sampling.num_plain_steps", 0 <= sampling.num_plain_steps < sampling.num_steps, "from 0 to num_steps - 1"),
        ("sampling.num_inner_steps", sampling.num_inner_steps >= 0, "at least 0"),
        ("sampling.num_candidates", sampling.num_candidates >= 2, "at least 2"),
        ("sampling.eta", sampling.eta > 0, "positive, because candidates differ only by their noise"),
        ("sampling.continuation", sampling.continuation in ("random", "win"), "random or win"),
        ("scorer.chunk", config.scorer.chunk >= 0, "at least 1, or 0 for no limit"),
        ("pairs.threshold", 0 <= config.pairs.threshold < 1, "in [0, 1)"),
        ("loss.beta", config.loss.beta > 0, "positive"),
        ("loss.clip_range", 0 < config.loss.clip_range < 1, "in (0, 1)"),
        ("lora.rank", config.lora.rank >= 0, "at least 1, or 0 for full fine-tuning"),
        ("lora.init", not (config.lora.init and config.lora.rank == 0), "empty where lora.rank is 0"),
        ("train.optimizer", config.train.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
        ("train.accumulation_steps", config.train.accumulation_steps >= 1, "at least 1"),
        ("train.ema_decay", 0 < (config.train.ema_decay or 0.5) < 1, "off or in (0, 1)"),
        ("train.minibatch_size", config.train.minibatch_size >= 1, "at least 1"),
        ("train.learning_rate", config.train.learning_rate > 0, "positive"),
        ("checkpoint.every", config.checkpoint.every >= 1, "at least 1"),
        ("checkpoint.keep", config.checkpoint.keep >= 1, "at least 1"),
        ("evaluation.num_prompts", config.evaluation.num_prompts >= 1, "at least 1"),
        ("evaluation.batch_size", config.evaluation.batch_size >= 1, "at least 1"),
    ]
    _refuse(rules)
    if config.scorer.fn:
        load_function(config.scorer.fn)


def check_spm_config(config: ConfigDict) -> None:
    """The same for the config of a preference model."""
    timesteps = config.validation.timesteps
    batch_size = config.train.batch_size
    rules = [
        ("num_steps", config.num_steps >= 1, "at least 1"),
        ("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
        ("scorer.dtype", config.scorer.dtype in WRITTEN_DTYPES, " or ".join(WRITTEN_DTYPES)),
        ("guidance_scale", config.guidance_scale >= 0, "at least 0"),
        (
            "chunk",
            config.chunk == 0 or (config.chunk > 0 and batch_size % config.chunk == 0),
            "0 or a divisor of train.batch_size",
        ),
        (
            "chunk",
            config.chunk == 0 or config.validation.batch_size % config.chunk == 0,
            "0 or a divisor of validation.batch_size",
        ),
        (
            "timesteps",
            len(config.timesteps) == 2 and 0 <= config.timesteps[0] < config.timesteps[1],
            "two numbers, the first from 0 and the second larger",
        ),
        ("data.num_workers", config.data.num_workers >= 0, "at least 0"),
        ("labels.threshold", 0 <= config.labels.threshold < 1, "in [0, 1)"),
        ("train.batch_size", batch_size >= 1, "at least 1"),
        ("train.learning_rate", config.train.learning_rate > 0, "positive"),
        ("train.warmup_steps", 0 <= config.train.warmup_steps < config.num_steps, "from 0 to num_steps - 1"),
        ("train.optimizer", config.train.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
        ("train.accumulation_steps", config.train.accumulation_steps >= 1, "at least 1"),
        ("train.ema_decay", 0 < (config.train.ema_decay or 0.5) < 1, "off or in (0, 1)"),
        ("log_every", config.log_every >= 1, "at least 1"),
        (
            "checkpoint.every",
            config.checkpoint.every >= 1 and config.checkpoint.every % config.log_every == 0,
            "a multiple of log_every",
        ),
        ("checkpoint.keep", config.checkpoint.keep >= 1, "at least 1"),
        (
            "validation.every",
            config.validation.every >= 1 and config.validation.every % config.log_every == 0,
            "a multiple of log_every",
        ),
        ("validation.num_pairs", config.validation.num_pairs >= 1, "at least 1"),
        ("validation.batch_size", config.validation.batch_size >= 1, "at least 1"),
        (
            "validation.timesteps",
            len(timesteps) > 0 and min(timesteps) >= 0,
            "at least one timestep, each from 0",
        ),
    ]
    _refuse(rules)


def _refuse(rules: list[tuple[str, bool, str]]) -> None:
    for name, holds, requirement in rules:
        if not holds:
            raise UserError(f"config.{name} must be {requirement}; see the config file for what it means.")
