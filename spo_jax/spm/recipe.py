"""Training of a preference model: assemble; for each optimizer step its minibatches, log, measure, save; finish."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.data.preferences import open_pairs
from spo_jax.distributed.mesh import check_divisible, make_mesh
from spo_jax.runs import wandb_run
from spo_jax.runs.artifacts import ready
from spo_jax.runs.load import Weights
from spo_jax.runs.loop import Loop, Unit
from spo_jax.spm.assemble import assemble
from spo_jax.spm.config import check
from spo_jax.spm.evaluation import finish
from spo_jax.spm.pairs import to_devices
from spo_jax.spm.steps import Training, finish_step, kept, training_pairs
from spo_jax.spm.update import metrics_from_json


@wandb_run.finished
def train(config: ConfigDict, workdir: Path) -> dict[str, object] | None:
    """Trains a preference model and measures it; goes on where an interrupted run of the same command stopped.

    Args:
      config: see ``spm/config.py`` and ``runs/config.py`` for every key.
      workdir: gets ``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, the preference models
        ``last`` and ``best`` (by accuracy on the validation pairs), ``summary.json``, ``report.html`` and a
        model card, ``README.md``.

    Returns:
      What ``summary.json`` holds; None if SIGTERM has stopped the run, whose state is then saved.

    Raises:
      UserError: a mistake in config, files or workdir (before anything is written), or a loss that is not finite.
    """
    began = time.time()
    check(config)
    wandb_run.check(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_divisible("config.train.batch_size", config.train.batch_size, mesh)
    check_divisible("config.validation.batch_size", config.validation.batch_size, mesh)
    check_divisible("config.chunk", config.chunk, mesh)
    source, held_out = open_pairs(config.data.train), open_pairs(config.data.validation)
    config, pins = ready(config, workdir)
    spm = assemble(config, mesh, Weights())
    pairs_key = rng.stream(jax.random.key(config.seed), "pairs")

    # Beside the arrays: where the data stand, metrics that are not logged yet, and the accuracies so far by step.
    extra: dict[str, object] = {"data": None, "window": [], "accuracy": {}}
    with Loop(config, workdir, pins, spm.state, Unit("SPM", "step", config.num_steps), extra) as loop:
        loader = loop.enter(contextlib.closing(training_pairs(spm, source, loop.extra["data"])))
        run = Training(spm, loop, loader, metrics_from_json(loop.extra["window"]), held_out, workdir)
        loop.on_save = lambda state: kept(run)
        finish_step(run)  # of the step that is saved: SIGTERM may have come before it was logged and measured
        for _ in loop.steps():
            state = loop.state
            for _ in range(config.train.accumulation_steps):
                pairs = to_devices(spm.tokenizers, next(loader), mesh)
                state, metrics = spm.programs["update"](state, spm.frozen, pairs, pairs_key)
                run.window.append(metrics)
            loop.advance(state)
            if loop.preempted():
                break
            finish_step(run)
    return None if loop.preempted() else finish(run, began)
