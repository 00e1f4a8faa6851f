"""Training of a step-aware preference model, from top to bottom: mesh, data, models, state, restore, loop, evidence."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from spo_jax import rng
from spo_jax.checkpoints.pipeline import (
    Pipeline,
    read_clip,
    read_pipeline,
    read_tokenizer,
    tokenize,
    tokenize_prompts,
    with_image_size,
    with_vae,
)
from spo_jax.data.preferences import PairBatch, PairLoader, open_pairs
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import (
    batch_sharding,
    check_divisible,
    make_mesh,
    replicated,
    weight_sharding,
    weight_shardings,
)
from spo_jax.emoji import resolve
from spo_jax.preference.scorers import make_clip_scorer
from spo_jax.training import checkpoint
from spo_jax.training.config_check import check_spm_config
from spo_jax.training.metrics import MetricsWriter, check_finite
from spo_jax.training.noisy_pairs import make_predict_clean
from spo_jax.training.optimizer import make_optimizer, warmup_linear_decay
from spo_jax.training.report import write_summary
from spo_jax.training.rollout import make_encode
from spo_jax.training.spm_update import make_relabel, make_spm_update, spm_metrics
from spo_jax.types import JudgedPairs, PromptBatch, TrainState


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains a preference model and measures it; going on where an interrupted run of the same command stopped.

    Args:
      config: see ``configs/common_spm.py`` for every key.
      workdir: gets ``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, the preference models ``best``
        (by accuracy on the validation pairs) and ``last``, and ``summary.json``.

    Returns:
      What ``summary.json`` holds.

    Raises:
      UserError: a mistake in config, files or workdir (before anything is written), or a loss that is not finite.
    """
    began = time.time()

    # ---------------------------------------------------------------------------------------------------------- mesh
    check_spm_config(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_divisible("config.train.batch_size", config.train.batch_size, mesh)
    check_divisible("config.validation.batch_size", config.validation.batch_size, mesh)
    check_divisible("config.chunk", config.chunk, mesh)

    def placement(_path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        return weight_sharding(mesh, shape)

    # ---------------------------------------------------------------------------------------------------------- data
    source, validation_source = open_pairs(resolve(config.data.train)), open_pairs(resolve(config.data.validation))

    # -------------------------------------------------------------------------------------------------------- models
    dtype = jnp.dtype(config.dtype)
    pipeline = read_pipeline(resolve(config.model), dtype, variant=config.variant or None, sharding=placement)
    if config.vae:
        pipeline = with_vae(pipeline, resolve(config.vae), dtype, sharding=placement)
    pipeline = with_image_size(pipeline, config.height, config.width)
