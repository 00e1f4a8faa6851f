"""What is done between the optimizer's steps: logging, measuring, saving."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from spo_jax import rng
from spo_jax.data.preferences import PairLoader, total_state
from spo_jax.distributed.mesh import fetch
from spo_jax.distributed.processes import is_main_process
from spo_jax.errors import UserError
from spo_jax.evaluation.pair_accuracy import SCORER, accuracy_row, first_pairs, measure_accuracy
from spo_jax.formats.scorers import write_scorer
from spo_jax.runs.loop import Loop
from spo_jax.runs.metrics import window_to_json
from spo_jax.runs.pair_data import data_metrics, open_loader, validation_loader
from spo_jax.spm.assemble import SPM
from spo_jax.spm.update import SPMMetrics, spm_metrics


class Training(NamedTuple):
    """A run that is going on.

    ``window`` are the metrics of minibatches since the last row of the log.
    """

    spm: SPM
    loop: Loop
    loader: PairLoader
    window: list[SPMMetrics]
    workdir: Path

    @property
    def accuracy(self) -> dict[str, Any]:
        """Measured so far, by step and timestep."""
        return self.loop.extra["accuracy"]

    @property
    def validation_key(self) -> jax.Array:
        """Of the noise of validation, always the same."""
        return rng.stream(jax.random.key(self.spm.config.seed), "validation")


def training_pairs(spm: SPM, state: dict[str, Any] | None) -> PairLoader:
    """The endless stream of this process's share of the minibatches, from a saved state on."""
    data, size = spm.config.data, spm.pipeline.image_size
    options = {"state": state, "keep_only_with_label": data.keep_only_with_label}
    return open_loader(spm.config, data.train, spm.config.train.batch_size, size, **options)


def finish_step(run: Training) -> None:
    """Logs, measures and saves what is due after the step that is done; leaves early when SIGTERM has come."""
    loop, config = run.loop, run.spm.config
    if loop.preempted():
        return
    row: dict[str, float] = {}
    if run.window and loop.due(config.log_every):
        row = {
            **spm_metrics(run.window),
            "learning_rate": float(run.spm.learning_rate(loop.finished - 1)),
            **data_metrics(total_state(run.loader.state())["counts"]),
        }
        loop.check(row)
    step = str(loop.finished)
    if step not in run.accuracy and loop.due(config.validation.every):
        measured = measure(run)
        if measured is None:
            return
        run.accuracy[step] = measured
        if loop.finished:
            row |= {f"accuracy_t{t}": entry["accuracy"][SCORER]["value"] for t, entry in measured.items()}
            if best_step(run.accuracy) == loop.finished:
                write_model(run, "best")
    if row:
        loop.log(row, *(name for name in ("loss", "accuracy") if name in row))
        run.window.clear()
    if loop.finished and loop.due(config.checkpoint.every):
        write_model(run, "last")
        loop.save()


def measure(run: Training) -> dict[str, Any] | None:
    """Accuracy by timestep on the validation pairs, always the same with the same noise; None if SIGTERM has come."""
    spm, loop, validation = run.spm, run.loop, run.spm.config.validation
    params = {**spm.pipeline.params, "scorers": spm.asked_params(loop.state.result)}
    with contextlib.closing(validation_loader(spm.config, spm.pipeline.image_size)) as loader:
        batches = first_pairs(loader, validation.num_pairs)
        batches = itertools.takewhile(lambda _: not loop.preempted(), batches)
        totals = measure_accuracy(spm.measure, params, batches, validation.timesteps, run.validation_key)
    if loop.preempted():
        return None
    if not next(iter(totals.values())).accuracy[SCORER].count:
        raise UserError(
            f"None of the first {validation.num_pairs} records of {spm.config.data.validation} is a pair with a "
            "preferred picture; nothing can be measured there, choose another config.data.validation."
        )
    return {str(timestep): accuracy_row(total) for timestep, total in totals.items()}


def kept(run: Training) -> dict[str, Any]:
    """What a checkpoint keeps beside the arrays; metrics that are not logged yet must be finite."""
    if run.window:
        run.loop.check(spm_metrics(run.window))
    return {
        "data": total_state(run.loader.state()),
        "window": window_to_json(run.window),
        "accuracy": run.accuracy,
    }


def write_model(run: Training, name: str) -> None:
    """Writes the preference model as it is now; all processes must call this, the first one writes."""
    params = fetch(run.loop.state.result)
    if is_main_process():
        write_scorer(run.workdir / name, run.spm.clip, params, dtype=run.spm.config.scorer.dtype)


def best_step(accuracy: Mapping[str, Mapping[str, Any]]) -> int:
    """The measured step, after the start, with the highest accuracy over all timesteps; the earliest of equal ones."""

    def mean(step: int) -> float:
        return float(np.mean([row["accuracy"][SCORER]["value"] for row in accuracy[str(step)].values()]))

    return max((int(step) for step in accuracy if step != "0"), key=lambda step: (mean(step), -step))
