"""Training of a preference model: assemble; for each optimizer step its minibatches, log, measure, save; finish."""

from __future__ import annotations

import contextlib
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.data.placed_pairs import to_devices
from spo_jax.runs.load import Weights
from spo_jax.runs.loop import Loop, RunFolder, Unit
from spo_jax.runs.metrics import window_from_json
from spo_jax.spm.assemble import assemble
from spo_jax.spm.evaluation import finish
from spo_jax.spm.steps import Training, finish_step, kept, training_pairs
from spo_jax.spm.update import SPMMetrics


def train(config: ConfigDict, mesh: Mesh, folder: RunFolder) -> dict[str, object] | None:
    """Trains a preference model and measures it, see ``methods.train``.

    Args:
      config: checked; what it names is on this machine.
      mesh: the devices.
      folder: gets ``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, the preference models
        ``last`` and ``best`` (by accuracy on the validation pairs), ``summary.json``, ``report.html`` and a
        model card, ``README.md``.
    """
    began = time.time()
    spm = assemble(config, mesh, Weights)
    pairs_key = rng.stream(jax.random.key(config.seed), "pairs")

    # Beside the arrays: where the data stand, metrics that are not logged yet, and the accuracies so far by step.
    extra: dict[str, object] = {"data": None, "window": [], "accuracy": {}}
    with Loop(folder, spm.state, Unit("SPM", "step", config.num_steps), extra) as loop:
        loader = loop.enter(contextlib.closing(training_pairs(spm, loop.extra["data"])))
        run = Training(spm, loop, loader, window_from_json(SPMMetrics, loop.extra["window"]), folder.path)
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
