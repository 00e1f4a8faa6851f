"""Training of a step-aware preference model, from top to bottom: mesh, data, models, state, restore, loop, evidence."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from spo_jax import rng
from spo_jax.data.preferences import PairBatch, PairLoader, open_pairs, total_state
from spo_jax.data.records import FAULTS
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.distributed.mesh import check_divisible, fetch, jit_on, make_mesh, replicated
from spo_jax.distributed.processes import is_main_process
from spo_jax.distributed.sharding import weight_sharding, weight_shardings
from spo_jax.errors import UserError
from spo_jax.evaluation.pair_accuracy import (
    PLAIN,
    SCORER,
    TOLD_0,
    Judge,
    accuracy_row,
    first_pairs,
    make_measure_accuracy,
)
from spo_jax.formats.base import base_of_config, read_base
from spo_jax.formats.pipeline import read_clip, with_image_size
from spo_jax.formats.scorers import fitted_to, make_scorer, tokenizer_of
from spo_jax.formats.write_scorer import write_scorer
from spo_jax.images import to_uint8
from spo_jax.preference.scorers import make_clip_scorer
from spo_jax.runs import checkpoint, preemption, wandb_run
from spo_jax.runs.artifacts import ready
from spo_jax.runs.metrics import METRICS_FILE, MetricsWriter, check_finite, read_metrics, write_summary
from spo_jax.runs.optimizer import make_optimizer, warmup_linear_decay
from spo_jax.sampling.encode import make_encode_captions
from spo_jax.sampling.noisy_pairs import make_look, make_predict_clean
from spo_jax.spm.card import write_preference_card
from spo_jax.spm.config import check
from spo_jax.spm.judged_pairs import Tokenizers, make_to_devices
from spo_jax.spm.report import ShownPair, write_spm_report
from spo_jax.spm.update import make_relabel, make_spm_update, metrics_from_json, metrics_to_json, spm_metrics
from spo_jax.types import JudgedPairs, TrainState

NUM_REPORT_PAIRS = 8


@wandb_run.finished
def train(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Trains a preference model and measures it; going on where an interrupted run of the same command stopped.

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
    began, main = time.time(), is_main_process()  # the other processes of a run compute, and write checkpoints only

    # ---------------------------------------------------------------------------------------------------------- mesh
    check(config)
    wandb_run.check(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_divisible("config.train.batch_size", config.train.batch_size, mesh)
    check_divisible("config.validation.batch_size", config.validation.batch_size, mesh)
    check_divisible("config.chunk", config.chunk, mesh)
    placement = functools.partial(weight_sharding, mesh)

    # ---------------------------------------------------------------------------------------------------------- data
    source, held_out = open_pairs(config.data.train), open_pairs(config.data.validation)

    # -------------------------------------------------------------------------------------------------------- models
    config, pins = ready(config, workdir)
    dtype = jnp.dtype(config.dtype)
    pipeline = read_base(base_of_config(config), dtype, sharding=placement)
    pipeline = with_image_size(pipeline, config.height, config.width)
    clip, start = read_clip(config.scorer.init, step_aware=config.scorer.step_aware, sharding=placement)
    clip = clip.clone(dtype=dtype, remat=config.remat)  # it computes in ``dtype``; its parameters stay float32
    scorer = make_clip_scorer(clip)
    tokenizers = Tokenizers(pipeline, fitted_to(scorer, tokenizer_of(config.scorer.tokenizer, pipeline)))
    frozen, relabel = dict(pipeline.params), None
    if config.labels.judge:
        judge, frozen["judge"] = read_clip(config.labels.judge, step_aware=None, dtype=dtype, sharding=placement)
        # It sees the pictures themselves, as CLIP's own image processor would show them.
        labeller = make_clip_scorer(judge, antialias=True)
        relabel = make_relabel(labeller, config.labels.threshold)
        tokenizers = tokenizers._replace(judge=fitted_to(labeller, tokenizer_of(config.labels.tokenizer, pipeline)))
    judges, fixed = {SCORER: Judge(scorer, tokenizers.scorer)}, {}
    if config.scorer.step_aware:
        judges[TOLD_0] = Judge(scorer, tokenizers.scorer, step_aware=False)
    if config.validation.plain:
        plain, fixed[PLAIN] = make_scorer(config.validation.plain, dtype=dtype, sharding=placement)
        judges[PLAIN] = Judge(plain, fitted_to(plain, tokenizers.scorer), step_aware=False)
    # Only the timesteps of training matter; the number of sampling steps plays no part.
    schedule = make_schedule(pipeline.scheduler_config, num_steps=1)
    check_timesteps(config, len(schedule.alphas_cumprod))
    predict_clean = make_predict_clean(pipeline, schedule, config.guidance_scale, config.chunk)
    encode = make_encode_captions(pipeline)

    # --------------------------------------------------------------------------------------------------------- state
    root = jax.random.key(config.seed)
    rate, warmup_steps = config.train.learning_rate, config.train.warmup_steps
    learning_rate = warmup_linear_decay(rate, warmup_steps, config.num_steps, config.train.warmup)
    optimizer = make_optimizer(config.train, learning_rate)
    average = None if not config.train.ema_decay else jax.tree.map(jnp.copy, start)
    state = TrainState(jnp.zeros((), jnp.int32), start, optimizer.init(start), average)
    shardings = weight_shardings(mesh, state)
    state = jax.device_put(state, shardings)

    # ------------------------------------------------------------------------------------------------------- restore
    checkpoint.check_workdir(workdir, config.to_dict(), pins)
    manager = checkpoint.make_manager(workdir / "checkpoints", config.checkpoint.keep)
    # Beside the arrays: where the data stand, metrics that are not logged yet, and the accuracies so far by step.
    done: dict[str, Any] = {"step": 0, "seconds": 0.0, "data": None, "window": [], "accuracy": {}}
    restored = checkpoint.restore_latest(manager, state)
    if restored is not None:
        state, done = restored
    first_step, window, accuracy = done["step"], metrics_from_json(done["window"]), done["accuracy"]
    run = wandb_run.start(config, workdir, first_step)

    # ---------------------------------------------------------------------------------------------------------- loop
    update = make_spm_update(
        encode,
        predict_clean,
        scorer,
        optimizer,
        timesteps=config.timesteps,
        relabel=relabel,
        ema_decay=config.train.ema_decay or 0.0,
    )
    update = jit_on(mesh, update, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    on_devices = make_to_devices(tokenizers, mesh)
    local_size = config.train.batch_size // jax.process_count()
    options = {"size": pipeline.image_size, "num_workers": config.data.num_workers, "strict": config.data.strict}
    options |= {"keep_only_with_label": config.data.keep_only_with_label, "seed": config.seed}
    options |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
    pairs_key, validation_key = rng.stream(root, "pairs"), rng.stream(root, "validation")
    measure_accuracy = make_measure_accuracy(pipeline, predict_clean, judges, mesh)

    def validation_pairs() -> PairLoader:
        once = {**options, "batch_size": config.validation.batch_size // jax.process_count()}
        return PairLoader(held_out, **once | {"shuffle": False, "num_epochs": 1, "keep_only_with_label": True})

    def measure(state: TrainState, preempted: Callable[[], bool]) -> dict[str, Any] | None:
        """Accuracy by timestep on the validation pairs, always the same with the same noise; None if preempted."""
        params = {**pipeline.params, "judges": dict.fromkeys(judges, state.result) | fixed}
        with contextlib.closing(validation_pairs()) as loader:
            batches = first_pairs(loader, config.validation.num_pairs)
            batches = itertools.takewhile(lambda _: not preempted(), batches)
            totals = measure_accuracy(params, batches, config.validation.timesteps, validation_key)
        if preempted():
            return None
        if not next(iter(totals.values())).accuracy[SCORER].count:
            raise UserError(
                f"None of the first {config.validation.num_pairs} records of {config.data.validation} is a pair with a "
                "preferred picture; nothing can be measured there, choose another config.data.validation."
            )
        return {str(timestep): accuracy_row(total) for timestep, total in totals.items()}

    training_began, saved = time.time(), first_step
    with (
        preemption.watch() as preempted,
        contextlib.closing(PairLoader(source, batch_size=local_size, state=done["data"], **options)) as loader,
        MetricsWriter(workdir, first_step, run, enabled=main) as writer,
        tqdm(
            total=config.num_steps,
            initial=first_step,
            desc="SPM",
            unit="step",
            dynamic_ncols=True,
            disable=not main,
        ) as progress,
    ):

        def write(name: str) -> None:
            params = fetch(state.result)  # by all processes together
            if main:
                write_scorer(workdir / name, clip, params, dtype=config.scorer.dtype)

        def save(step: int) -> None:
            extra = {"step": step, "seconds": done["seconds"] + time.time() - training_began}
            extra |= {"data": total_state(loader.state()), "window": metrics_to_json(window), "accuracy": accuracy}
            checkpoint.save(manager, step, state, extra)

        # From the step that is saved: SIGTERM may have come before it was logged and measured.
        for step in range(first_step, config.num_steps + 1):
            if step > first_step:
                for _ in range(config.train.accumulation_steps):
                    state, metrics = update(state, frozen, on_devices(next(loader)), pairs_key)
                    window.append(metrics)
                progress.update()
            if preempted():
                break
            row, last = {}, step == config.num_steps
            if window and (last or step % config.log_every == 0):
                row = {
                    **spm_metrics(window),
                    "learning_rate": float(learning_rate(step - 1)),
                    **data_metrics(total_state(loader.state())["counts"]),
                }
                check_finite(row, step, workdir)
                progress.set_postfix(loss=f"{row['loss']:.4f}", accuracy=f"{row['accuracy']:.3f}")
            if str(step) not in accuracy and (last or step % config.validation.every == 0):
                measured = measure(state, preempted)
                if measured is None:
                    break
                accuracy[str(step)] = measured
                if step:
                    row |= {f"accuracy_t{t}": entry["accuracy"][SCORER]["value"] for t, entry in measured.items()}
                    if best_step(accuracy) == step:
                        write("best")
            if row:
                writer.write(step, row)
                window = []
            if last or (step and step % config.checkpoint.every == 0):
                write("last")
                if step != saved:
                    save(step)
                    saved = step
        if saved != step:
            if window:
                check_finite(spm_metrics(window), step, workdir)
            save(step)
        counts = total_state(loader.state())["counts"]
        checkpoint.close(manager)
        if preempted():
            preemption.say_stopped("step", step)
            return None

    # ------------------------------------------------------------------------------------------------------ evidence
    best = best_step(accuracy)
    shown = {"start": 0, "best": best, "last": config.num_steps}
    summary = {
        "accuracy": {name: accuracy[str(step)] for name, step in shown.items()},
        "best_step": best,
        "records": counts,
        "seconds": round(time.time() - began + done["seconds"], 1),
        "seed": config.seed,
        "config": config.to_dict(),
    }
    with contextlib.closing(validation_pairs()) as loader:
        look = make_look(encode, predict_clean, scorer, mesh)
        pairs = show_pairs(
            look, frozen, state.result, next(loader), on_devices, config.validation.timesteps, validation_key
        )
    if not main:
        return summary
    write_summary(workdir / "summary.json", summary)
    run.write_summary(summary)
    write_spm_report(
        workdir / "report.html", summary=summary, metrics=read_metrics(workdir / METRICS_FILE), pairs=pairs
    )
    write_preference_card(workdir / "README.md", summary=summary)
    print(
        f"Preference models: {workdir / 'best'} (step {best}) and {workdir / 'last'}\n"
        f"Report: {workdir / 'report.html'}\nNumbers: {workdir / 'summary.json'}"
    )
    return summary


# ------------------------------------------------------------------------------------------------------------ pieces
def check_timesteps(config: ConfigDict, count: int) -> None:
    """Raises UserError if the config names a timestep that the base model, which has ``count``, does not have."""
    for name, highest in (
        ("timesteps", config.timesteps[1] - 1),
        ("validation.timesteps", max(config.validation.timesteps)),
    ):
        if highest >= count:
            raise UserError(f"config.{name} goes up to {highest}, but the base model's last timestep is {count - 1}.")


def show_pairs(
    look: Callable[..., tuple[jax.Array, jax.Array]],
    frozen: Any,
    params: Any,
    batch: PairBatch,
    on_devices: Callable[[PairBatch], JudgedPairs],
    timesteps: Sequence[int],
    key: jax.Array,
) -> list[ShownPair]:
    """The first pairs of a batch at each timestep, for the report."""
    pairs = on_devices(batch)
    seen = [jax.device_get(look(frozen, params, pairs, jnp.int32(timestep), key)) for timestep in timesteps]
    images, scores = (np.stack(column, axis=1) for column in zip(*seen, strict=True))  # [B, T, 2, ...]
    usable = np.flatnonzero(batch.weights)[:NUM_REPORT_PAIRS]
    return [ShownPair(batch.captions[i], to_uint8(images[i]), scores[i], batch.labels[i]) for i in usable]


def data_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """Records so far: used, left out because nobody labelled them, and skipped, in all and by fault."""
    skipped = {f"skipped/{fault}": counts[fault] for fault in FAULTS if counts[fault]}
    return {
        "records_used": counts["used"],
        "records_unlabelled": counts["unlabelled"],
        "records_skipped": sum(skipped.values()),
        **skipped,
    }


def best_step(accuracy: Mapping[str, Mapping[str, Any]]) -> int:
    """The measured step, after the start, with the highest accuracy over all timesteps; the earliest of equal ones."""

    def mean(step: int) -> float:
        return float(np.mean([row["accuracy"][SCORER]["value"] for row in accuracy[str(step)].values()]))

    return max((int(step) for step in accuracy if step != "0"), key=lambda step: (mean(step), -step))
