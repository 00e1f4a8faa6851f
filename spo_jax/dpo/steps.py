"""What is done between the optimizer's steps: logging, measuring, saving, and telling that nothing is learned."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.data.augmentation import Augmentation
from spo_jax.data.placed_pairs import to_devices
from spo_jax.data.preferences import PairLoader, total_state
from spo_jax.distributed.mesh import fetch
from spo_jax.distributed.processes import say
from spo_jax.dpo.assemble import DPO
from spo_jax.dpo.update import ERRORS, DPOMetrics, dpo_metrics, rewards_of
from spo_jax.errors import UserError
from spo_jax.evaluation.pair_accuracy import first_pairs
from spo_jax.preference.accuracy import wilson_interval
from spo_jax.preference.losses import PairErrors
from spo_jax.runs.held_out import HeldOut, measure_curve, show_validation
from spo_jax.runs.loop import Loop
from spo_jax.runs.metrics import REWARDS, window_to_json
from spo_jax.runs.pair_data import data_metrics, open_loader, validation_loader

PATIENCE = 5  # rows of the log in a row before a warning
RUNAWAY = 1.5  # times the reference's error on the worse images, from where on the policy only unlearns
UNDECIDED = 0.52  # accuracy up to which a run has not taken the side of the labels
HELD_OUT_ACCURACY = "held_out/accuracy"


@dataclasses.dataclass
class Training:
    """A run that is going on.

    ``window`` are the metrics of minibatches since the last row of the log, ``rows`` those rows, and ``since`` is the
    time at which the first minibatch of the window began.
    """

    dpo: DPO
    loop: Loop
    loader: PairLoader
    held_out: HeldOut
    window: list[DPOMetrics]
    rows: list[dict[str, Any]]
    since: float

    @property
    def accuracy(self) -> dict[str, Any]:
        """Of the implicit reward on the validation pairs, measured so far, by step."""
        return self.loop.extra["accuracy"]


def training_pairs(dpo: DPO, state: dict[str, Any] | None) -> PairLoader:
    """The endless stream of this process's share of the minibatches, from a saved state on."""
    config, size = dpo.config, dpo.pipeline.image_size
    options = {"keep_only_with_label": config.data.keep_only_with_label, "drop_ties": config.data.drop_ties}
    augmentation = Augmentation(config.data.resize, config.data.flip, config.data.crop)
    return open_loader(
        config, config.data.train, config.train.batch_size, size, state=state, augmentation=augmentation, **options
    )


def finish_step(run: Training) -> None:
    """Logs, measures and saves what is due after the step that is done; leaves early when SIGTERM has come."""
    dpo, loop, config = run.dpo, run.loop, run.dpo.config
    if loop.preempted():
        return
    row: dict[str, float] = {}
    if run.window and loop.due(config.log_every):
        row = {
            **dpo_metrics(run.window, guard=config.loss.guard is not None),
            "seconds_update": time.time() - run.since,
            "learning_rate": float(dpo.learning_rate(loop.finished - 1)),
            **data_metrics(total_state(run.loader.state())["counts"]),
        }
        loop.check(row)
    if row and config.data.validation and loop.due(config.validation.every):
        if str(loop.finished) not in run.accuracy:
            measured = measure(run)
            if measured is None:
                return
            run.accuracy[str(loop.finished)] = measured
        measured = run.accuracy[str(loop.finished)]
        row |= {HELD_OUT_ACCURACY: measured["accuracy"]} | {f"held_out/{name}": measured[name] for name in ERRORS}
    if row and loop.due(config.evaluation.every):
        row |= measure_curve(dpo, loop, run.held_out)
    if row:
        loop.log(row, "loss", *({REWARDS[3]} & row.keys()))
        run.window.clear()
        run.rows.append({"step": loop.finished, **row})
        say(runs_away(run.rows), undecided(run.rows, config), not_moving(run.rows, config))
    if loop.finished and loop.due(config.checkpoint.every):
        loop.save()
    if row and loop.due(config.validation.every):
        show_validation(dpo, loop, run.held_out)
    if row:
        run.since = time.time()


def measure(run: Training) -> dict[str, Any] | None:
    """The implicit reward's accuracy on the validation pairs, always with the same noise; None if SIGTERM has come.

    An image's error is the mean over the timesteps; pairs whose labels are equal are left out.
    """
    dpo, loop, validation = run.dpo, run.loop, run.dpo.config.validation
    key = rng.stream(jax.random.key(dpo.config.seed), "validation")
    agreed, sums = [], np.zeros(4)
    with contextlib.closing(validation_loader(dpo.config, dpo.pipeline.image_size)) as loader:
        for batch in itertools.takewhile(lambda _: not loop.preempted(), first_pairs(loader, validation.num_pairs)):
            pairs = to_devices(dpo.tokenizers, batch, dpo.mesh)
            total: PairErrors | None = None
            for timestep in validation.timesteps:
                models = loop.state.result, loop.state.reference, dpo.pair_params
                errors, tied, usable = dpo.programs["errors"](*models, pairs, jnp.int32(timestep), key)
                total = errors if total is None else jax.tree.map(jnp.add, total, errors)
            mean, tied, usable = fetch((jax.tree.map(lambda x: x / len(validation.timesteps), total), tied, usable))
            counted = np.asarray(usable & ~tied)
            agreed += list(np.asarray(rewards_of(mean, dpo.objective, dpo.options)[2])[counted])
            four = (mean.win, mean.lose, mean.win_reference, mean.lose_reference)
            sums += [float(np.asarray(x)[counted].sum()) for x in four]
    if loop.preempted():
        return None
    if not agreed:
        raise UserError(
            f"None of the first {validation.num_pairs} records of {dpo.config.data.validation} is a pair with a "
            "preferred picture; nothing can be measured there, choose another config.data.validation."
        )
    count, right = len(agreed), float(np.sum(agreed))
    return {
        "accuracy": right / count,
        "interval": list(wilson_interval(right, float(count))),
        "pairs": count,
        **{name: float(value) / count for name, value in zip(ERRORS, sums, strict=True)},
    }


def kept(run: Training) -> dict[str, Any]:
    """What a checkpoint keeps beside the arrays; metrics that are not logged yet must be finite."""
    if run.window:
        run.loop.check(dpo_metrics(run.window, guard=False))
    return {
        "data": total_state(run.loader.state()),
        "window": window_to_json(run.window),
        "accuracy": run.accuracy,
    }


# ------------------------------------------------------------------------------------------------------------ warnings
def runs_away(rows: Sequence[Mapping[str, float]]) -> str | None:
    """What to tell a user whose model unlearns more than it learns; None if it does not, or is told already."""
    chosen, rejected, chosen_reference, rejected_reference = ERRORS

    def away(row: Mapping[str, float]) -> bool:
        if rejected_reference not in row:
            return False
        worse = row[rejected] > RUNAWAY * row[rejected_reference]
        return worse and row[chosen] > row[chosen_reference]

    return _once(
        rows,
        away,
        f"warning: in the last {PATIENCE} rows the error on the worse images was over {RUNAWAY} times the reference's, "
        "and that on the better ones has grown too, so the model unlearns both; stop here, or start again with a lower "
        "config.train.learning_rate, a higher config.loss.beta or the guard, config.loss.guard=0.9.",
    )


def undecided(rows: Sequence[Mapping[str, float]], config: ConfigDict) -> str | None:
    """What to tell a user whose implicit reward does not prefer what people preferred; None if all is well.

    Rows of the warm-up do not count.
    """
    learning = [row for row in rows if row["step"] > config.train.warmup_steps]
    return _once(
        learning,
        lambda row: REWARDS[3] in row and row[REWARDS[3]] <= UNDECIDED,
        f"warning: {REWARDS[3]} has stayed at one half over the last {PATIENCE} rows, so the model does not learn what "
        "people preferred; try a higher config.train.learning_rate, more pairs, or look whether the labels are right.",
    )


def not_moving(rows: Sequence[Mapping[str, float]], config: ConfigDict) -> str | None:
    """What to tell a user whose loss stays where indifference has it; None if it moves, or is not that of dpo."""
    learning = [row for row in rows if row["step"] > config.train.warmup_steps]
    return _once(
        learning,
        lambda row: config.loss.kind == "dpo" and abs(row["loss"] - math.log(2.0)) < 1e-3,
        f"warning: the loss has stayed at log 2 over the last {PATIENCE} rows, so policy and reference are still the "
        "same; raise config.train.learning_rate or config.loss.beta.",
    )


def _once(rows: Sequence[Mapping[str, float]], bad: Callable[[Mapping[str, float]], bool], sentence: str) -> str | None:
    """The sentence when exactly the last ``PATIENCE`` rows are bad: so it is said once as long as that lasts."""
    streak = len(list(itertools.takewhile(bad, reversed(rows))))
    return sentence if streak == PATIENCE else None
