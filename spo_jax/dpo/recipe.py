"""The method ``dpo`` from top to bottom: assemble; for each optimizer step its minibatches, log, measure; finish."""

from __future__ import annotations

import contextlib
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.data.placed_pairs import to_devices
from spo_jax.data.preferences import total_state
from spo_jax.distributed.processes import say
from spo_jax.dpo.assemble import assemble
from spo_jax.dpo.steps import Training, finish_step, kept, training_pairs
from spo_jax.dpo.update import DPOMetrics
from spo_jax.dpo.words import words_of
from spo_jax.runs.held_out import cut_texts, encode_held_out
from spo_jax.runs.load import Weights
from spo_jax.runs.loop import Loop, RunFolder, Unit
from spo_jax.runs.metrics import METRICS_FILE, read_metrics, window_from_json
from spo_jax.runs.result import finish, write_result
from spo_jax.runs.state import TrainState


def train(config: ConfigDict, mesh: Mesh, folder: RunFolder) -> dict[str, object] | None:
    """Trains adapters or a whole UNet on given pairs and measures it, see ``methods.train``.

    Args:
      config: checked; what it names is on this machine.
      mesh: the devices.
      folder: gets what a run of SPO leaves (see ``spo/recipe.py``); its sheets are named by steps.
    """
    began = time.time()
    dpo = assemble(config, mesh, Weights)
    say(cut_texts(dpo, dpo.held_out, "held-out prompts"))
    pairs_key = rng.stream(jax.random.key(config.seed), "pairs")

    # Beside the arrays: where the data stand, metrics that are not logged yet, and the accuracies so far by step.
    extra: dict[str, object] = {"data": None, "window": [], "accuracy": {}}
    with Loop(folder, dpo.state, Unit("DPO", "step", config.num_steps), extra) as loop:
        loader = loop.enter(contextlib.closing(training_pairs(dpo, loop.extra["data"])))
        window = window_from_json(DPOMetrics, loop.extra["window"])
        # Those before the window: that of a step which is still to be logged may be there, from before a kill.
        rows = read_metrics(folder.path / METRICS_FILE, loop.finished - bool(window))
        run = Training(dpo, loop, loader, encode_held_out(dpo), window, rows, time.time())

        def on_save(state: TrainState) -> dict[str, object]:
            if config.lora.rank:
                write_result(folder.path, dpo.pipeline, state.result)
            return kept(run)

        loop.on_save = on_save
        finish_step(run)  # of the step that is saved: SIGTERM may have come before it was logged and measured
        for _ in loop.steps():
            state = loop.state
            for _ in range(config.train.accumulation_steps):
                pairs = to_devices(dpo.tokenizers, next(loader), mesh)
                state, metrics = dpo.programs["update"](state, dpo.pair_params, pairs, pairs_key)
                run.window.append(metrics)
            loop.advance(state)
            if loop.preempted():
                break
            finish_step(run)
    if loop.preempted():
        return None
    records = total_state(loader.state())["counts"]
    more = {"records": records, "held_out_accuracy": run.accuracy}
    return finish(dpo, loop, run.held_out, words_of(config, records["used"], run.accuracy), began, more=more)
