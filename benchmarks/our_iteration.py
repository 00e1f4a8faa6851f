"""One iteration of SPO with the programs that training runs, on the models of ``benchmarks.models``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.measure import GIB, Batch, Turn, Work, measured, turn_of
from spo_jax import rng
from spo_jax.distributed.mesh import make_mesh
from spo_jax.runs.load import Weights
from spo_jax.spo import config as spo_config
from spo_jax.spo.assemble import SPO, assemble
from spo_jax.spo.steps import collect, draw, next_prompts, run_updates
from spo_jax.spo.update import update_metrics


def config_for(work: Work, folder: Path, dtype: str) -> ConfigDict:
    """The recipe of the paper with the sizes of ``work``. Every pair counts, so that both programs have as many."""
    config = spo_config.get_config()
    config.model, config.scorer.path, config.dtype = str(folder), str(folder / "scorer"), dtype
    config.prompts = config.evaluation.prompts = str(folder / "prompts.txt")
    # Evaluation is not measured, and colorfulness is the metric that needs no network.
    config.evaluation.metrics, config.evaluation.num_prompts = ("colorfulness",), 1
    config.prompts_per_batch, config.train.minibatch_size = len(work.texts), work.minibatch
    config.sampling.num_steps, config.sampling.num_plain_steps = work.steps, work.plain_steps
    config.sampling.num_candidates = work.candidates
    config.sampling.height = config.sampling.width = work.pixels
    config.lora.rank, config.pairs.threshold = work.rank, 0.0
    spo_config.check(config)
    return config


def load(work: Work, folder: Path, dtype: str) -> SPO:
    """Reads the models, on the first device."""
    return assemble(config_for(work, folder, dtype), make_mesh(1, 1, jax.devices()[:1]), Weights)


def nhwc(x: np.ndarray) -> np.ndarray:
    """[..., c, h, w] to [..., h, w, c]."""
    return np.moveaxis(x, -3, -1)


def measure(turn: Turn) -> dict[str, Any]:
    """One turn of our programs, called as ``spo/recipe.py`` calls them."""
    began = time.perf_counter()
    spo = load(turn.work, Path(turn.folder), turn.dtype)
    jax.block_until_ready((spo.params, spo.state))
    load_seconds = time.perf_counter() - began

    def batches() -> Iterator[Batch]:
        state, root = spo.state, jax.random.key(spo.config.seed)
        for batch in range(turn.repeats + 1):
            start = time.perf_counter()
            prompts = next_prompts(spo, batch)
            key = rng.stream(root, "rollout", batch)
            rollout, num_valid = collect(spo, draw(spo, state, prompts, key), prompts, key)
            jax.block_until_ready(rollout)
            sampled = time.perf_counter()
            state, updates = run_updates(spo, state, prompts, rollout, num_valid)
            jax.block_until_ready(state)
            end = time.perf_counter()
            assert num_valid == turn.work.pairs, "some pairs have equal scores"
            yield Batch(sampled - start, end - sampled, float(rollout.score_mean), update_metrics(updates)["loss"])

    def device_peak() -> float:
        return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] / GIB

    on_gpu = (device_peak, lambda: None) if turn.device == "gpu" else None  # JAX keeps one peak for the process
    return {"load": load_seconds, **measured(batches(), turn.repeats, on_gpu)}


if __name__ == "__main__":
    # transformers would import PyTorch for its tokenizer, where a machine that trains with JAX has none.
    sys.modules["torch"] = None  # type: ignore[assignment]
    print(json.dumps(measure(turn_of(sys.argv[1]))))
