"""One iteration of SPO with the programs that training runs, on the models of ``benchmarks.models``."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.models import Size
from spo_jax.distributed.mesh import make_mesh
from spo_jax.runs.load import Weights
from spo_jax.spo import config as spo_config
from spo_jax.spo.assemble import SPO, assemble


def config_for(size: Size, folder: Path, dtype: str) -> ConfigDict:
    """The recipe of the paper at a size. Every pair counts, so that both programs have as many."""
    config = spo_config.get_config()
    config.model, config.scorer.path, config.dtype = str(folder), str(folder / "scorer"), dtype
    config.prompts = config.evaluation.prompts = str(folder / "prompts.txt")
    # Evaluation is not measured, and colorfulness is the metric that needs no network.
    config.evaluation.metrics, config.evaluation.num_prompts = ("colorfulness",), 1
    config.prompts_per_batch, config.train.minibatch_size = size.prompts, size.minibatch
    config.sampling.num_steps, config.sampling.num_plain_steps = size.steps, size.plain_steps
    config.sampling.num_candidates = size.candidates
    config.sampling.height = config.sampling.width = size.pixels
    config.lora.rank, config.pairs.threshold = size.rank, 0.0
    spo_config.check(config)
    return config


def load(size: Size, folder: Path, dtype: str) -> SPO:
    """Reads the models, on the first device."""
    return assemble(config_for(size, folder, dtype), make_mesh(1, 1, jax.devices()[:1]), Weights)


def nhwc(x: np.ndarray) -> np.ndarray:
    """[..., c, h, w] to [..., h, w, c]."""
    return np.moveaxis(x, -3, -1)
