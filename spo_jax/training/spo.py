"""Step-aware preference optimization, from top to bottom: mesh, models, data, state, restore, loop, evidence."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from spo_jax import rng
from spo_jax.checkpoints.lora import starting_lora, write_lora
from spo_jax.checkpoints.pipeline import (
    Pipeline,
    read_clip,
    read_pipeline,
    tokenize,
    with_image_size,
    with_vae,
)
from spo_jax.checkpoints.write_pipeline import write_pipeline
from spo_jax.data.prompts import batch_indices, num_batches, read_prompts
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import Schedule, check_trainable, make_schedule
from spo_jax.distributed.mesh import (
    batch_sharding,
    check_divisible,
    fetch,
    make_mesh,
    replicated,
)
from spo_jax.distributed.processes import is_main_process
from spo_jax.distributed.sharding import weight_sharding, weight_shardings
from spo_jax.emoji import resolve
from spo_jax.images import grid, to_uint8, write_png
from spo_jax.preference.scorers import Scorer, make_clip_scorer
from spo_jax.training import checkpoint, preemption
from spo_jax.training.config_check import check_config
from spo_jax.training.evaluation import encode_prompts, make_measure, summarize
from spo_jax.training.exchange import arrange, make_exchange
from spo_jax.training.judges import check_function, make_scorer, tokenizer_of
from spo_jax.training.metrics import METRICS_FILE, MetricsWriter, check_finite, clipped_warning, read_metrics
from spo_jax.training.optimizer import make_optimizer
from spo_jax.training.report import write_report, write_summary
from spo_jax.training.rollout import Rollout, make_encode, make_pool, rollout_metrics, shard_prompts, time_score
from spo_jax.training.update import UpdateMetrics, make_loss, make_update, update_metrics
from spo_jax.types import PreferencePairs, PromptBatch, TrainState

NUM_REPORT_PICTURES = 24


def train(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Trains adapters and measures them; going on where an interrupted run of the same command stopped.

    Args:
      config: see ``configs/common.py`` for every key.
      workdir: gets ``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``validation/``,
        ``pytorch_lora_weights.safetensors`` (diffusers' format; after full fine-tuning a pipeline folder, ``model``),
        ``summary.json`` and ``report.html``.

    Returns:
      What ``summary.json`` holds; None if SIGTERM has stopped the run, whose state is then saved.

    Raises:
      UserError: a mistake in config, files or workdir (before anything is written), or a loss that is not finite.
    """
    began, main = time.time(), is_main_process()  # the other processes of a run compute, and write checkpoints only

    # ---------------------------------------------------------------------------------------------------------- mesh
    check_config(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_divisible("config.prompts_per_batch", config.prompts_per_batch, mesh)
    check_divisible("config.train.minibatch_size", config.train.minibatch_size, mesh)
    placement = functools.partial(weight_sharding, mesh)

    # ---------------------------------------------------------------------------------------------------------- data
    prompts = read_prompts(resolve(config.prompts))
    held_out = read_prompts(resolve(config.evaluation.prompts))[: config.evaluation.num_prompts]

    # -------------------------------------------------------------------------------------------------------- models
    dtype = jnp.dtype(config.dtype)
    pipeline = read_pipeline(resolve(config.model), dtype, variant=config.variant or None, sharding=placement)
    if config.vae:
        pipeline = with_vae(pipeline, resolve(config.vae), dtype, sharding=placement)
    pipeline = with_image_size(pipeline, config.sampling.height, config.sampling.width)
    pipeline = dataclasses.replace(pipeline, unet=pipeline.unet.clone(remat=config.remat))
    options: dict[str, Any] = {"dtype": dtype, "sharding": placement}
    scorer_tokenizer = tokenizer_of(config.scorer.tokenizer, pipeline)
    check_function(
        config.scorer.fn,
        num_images=config.prompts_per_batch * (config.scorer.chunk or config.sampling.num_candidates),
        image_size=pipeline.image_size,
        tokenizer=scorer_tokenizer,
    )
    scorer, scorer_params = make_scorer(config.scorer.path, config.scorer.fn, **options)
    judge_clip, judge_params = read_clip(resolve(config.evaluation.judge), step_aware=False, **options)
    judge = make_clip_scorer(judge_clip)
    params = {**pipeline.params, "scorer": scorer_params, "judge": judge_params}
    schedule = make_schedule(pipeline.scheduler_config, config.sampling.num_steps)
    check_trainable(schedule)
    encode = jax.jit(make_encode(pipeline, scorer))

    # --------------------------------------------------------------------------------------------------------- state
    root = jax.random.key(config.seed)
    optimizer = make_optimizer(config.train)
    trained = starting_point(config, rng.stream(root, "lora"), params["unet"])
    # A copy, because the update gives the buffers of the old state away.
    average = None if config.train.ema_decay is None else jax.tree.map(jnp.copy, trained)
    state = TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), average)
    state = jax.device_put(state, weight_shardings(mesh, state))

    # ------------------------------------------------------------------------------------------------------- restore
    checkpoint.check_workdir(workdir, config.to_dict())
    manager = checkpoint.make_manager(workdir / "checkpoints", config.checkpoint.keep)
    restored = checkpoint.restore_latest(manager, state)
    first_batch, seconds_before = 0, 0.0
    if restored is not None:
        state, extra = restored
        first_batch, seconds_before = extra["batch"], extra["seconds"]
    finished = saved = first_batch

    # ---------------------------------------------------------------------------------------------------------- loop
    programs = compile_programs(config, pipeline, scorer, schedule, optimizer, mesh, state)
    measure = make_measure(
        pipeline,
        scorer,
        judge,
        schedule,
        mesh,
        guidance_scale=config.sampling.guidance_scale,
        eta=config.evaluation.eta,
        batch_size=min(config.evaluation.batch_size, len(held_out)),
    )
    held_out_batch = encode_prompts(encode, params, pipeline, scorer_tokenizer, held_out)
    judge_text = jax.jit(judge.encode_text)(params["judge"], tokenize(pipeline.tokenizer, held_out))
    evaluation_key = rng.stream(root, "evaluation")
    seconds_per_score = 0.0
    history: list[dict[str, float]] = []
    warned = False
    training_began = time.time()

    def save() -> None:
        """Checkpoint and adapters of the state after ``finished`` batches, unless they are there."""
        nonlocal saved
        if saved != finished:
            seconds = seconds_before + time.time() - training_began
            checkpoint.save(manager, finished, state, {"batch": finished, "seconds": seconds})
            if "lora" in state.trained:
                write_result(workdir, state.result, pipeline.folder)
            saved = finished

    with (
        preemption.watch() as preempted,
        MetricsWriter(workdir, first_batch, enabled=main) as writer,
        tqdm(
            total=config.num_batches,
            initial=first_batch,
            desc="SPO",
            unit="batch",
            dynamic_ncols=True,
            disable=not main,
        ) as progress,
    ):
        for batch in range(first_batch, config.num_batches):
            indices = batch_indices(len(prompts), config.prompts_per_batch, config.seed, batch)
            prompt_batch = encode_prompts(encode, params, pipeline, scorer_tokenizer, [prompts[i] for i in indices])
            prompt_batch = shard_prompts(prompt_batch, mesh)
            if batch == first_batch:
                seconds_per_score = time_score(config, pipeline, scorer, params, prompt_batch)
            start = time.time()
            rollout = collect(programs, params, state.trained, prompt_batch, rng.stream(root, "rollout", batch))
            num_valid = int(rollout.num_valid)
            if preempted():
                break  # without updates of this batch: the next run makes the same pool again
            sampled = time.time()
            state, updates = run_updates(config, programs, state, params["unet"], prompt_batch, rollout, num_valid)
            num_pool_steps = config.sampling.num_steps - config.sampling.num_plain_steps
            num_scores = math.ceil(num_pool_steps / (config.sampling.num_inner_steps + 1))
            row = {
                "epoch": batch // num_batches(len(prompts), config.prompts_per_batch),
                **rollout_metrics(rollout, num_valid),
                **update_metrics(updates),
                "seconds_sample": max(0.0, sampled - start - num_scores * seconds_per_score),
                "seconds_score": min(sampled - start, num_scores * seconds_per_score),
                "seconds_update": time.time() - sampled,
            }
            check_finite(row, batch, workdir)
            writer.write(batch + 1, row)
            history.append(row)
            if (warning := clipped_warning(history)) and not warned:
                progress.write(f"spo_jax: {warning}")
                warned = True
            progress.set_postfix(loss=f"{row['loss']:.4f}", score=f"{row['preference_score_mean']:.3f}")
            progress.update()

            finished = batch + 1
            if preempted():
                break
            done = finished == config.num_batches
            if done or finished % config.checkpoint.every == 0:
                save()
            if config.validation.every and (done or finished % config.validation.every == 0):
                rows = slice(0, config.validation.num_prompts)
                some = held_out_batch.map_rows(itemgetter(rows))
                shown = measure(params, state.result, some, judge_text[rows], evaluation_key)
                if main:
                    sheet = grid(to_uint8(shown.images))
                    write_png(workdir / "validation" / f"batch_{finished:06d}.png", sheet, zoom=3)
                    writer.write_image(finished, "validation", sheet)
        save()
        checkpoint.close(manager)
        if preempted():
            preemption.say_stopped("batch", finished)
            return None
    seconds_training = seconds_before + time.time() - training_began
    write_result(workdir, state.result, pipeline.folder)

    # ------------------------------------------------------------------------------------------------------ evidence
    base = measure(params, {}, held_out_batch, judge_text, evaluation_key)
    tuned = measure(params, state.result, held_out_batch, judge_text, evaluation_key)
    summary = {
        **summarize(base, tuned),
        "seconds": round(time.time() - began + seconds_before, 1),
        "seconds_training": round(seconds_training, 1),
        "seed": config.seed,
        "config": config.to_dict(),
    }
    if not main:
        return summary
    write_summary(workdir / "summary.json", summary)
    pictures = zip(held_out, to_uint8(base.images), to_uint8(tuned.images), strict=True)
    write_report(
        workdir / "report.html",
        summary=summary,
        metrics=read_metrics(workdir / METRICS_FILE),
        samples=list(pictures)[:NUM_REPORT_PICTURES],
    )
    print(
        f"Tuned model wins on {summary['win_rate']:.1%} of {len(held_out)} held-out prompts by colourfulness, "
        f"{summary['win_rate_preference_score']:.1%} by preference score.\n"
        f"Report: {workdir / 'report.html'}\nNumbers: {workdir / 'summary.json'}\nAdapters: {workdir}"
    )
    return summary


# ------------------------------------------------------------------------------------------------------------ pieces
def starting_point(config: ConfigDict, key: jax.Array, unet_params: Any) -> Any:
    """The trained variables before the first update: adapters, or with rank 0 a float32 copy of the whole UNet."""
    if config.lora.rank == 0:
        return {"params": jax.tree.map(lambda x: jnp.array(x, jnp.float32), unet_params)}
    start_from = resolve(config.lora.init) if config.lora.init else None
    return {"lora": starting_lora(key, unet_params, config.lora.rank, start_from)}


def write_result(workdir: Path, trained: Any, source: Path) -> None:
    """Writes ``pytorch_lora_weights.safetensors``, or after full fine-tuning the pipeline folder ``model``.

    All processes must call this; the first one writes.
    """
    trained = fetch(trained)
    if not is_main_process():
        return
    if "lora" in trained:
        write_lora(workdir, trained["lora"])
    elif not (workdir / "model").exists():
        write_pipeline(workdir / "model", source, trained["params"])


class Programs(NamedTuple):
    """The programs of training, each compiled once in a run."""

    pool: Callable[..., tuple[PreferencePairs, jax.Array]]
    arrange: Callable[..., tuple[jax.Array, ...]]
    exchange: Callable[..., tuple[PromptBatch, PreferencePairs, jax.Array]]
    update: Callable[..., tuple[TrainState, UpdateMetrics]]


def compile_programs(
    config: ConfigDict,
    pipeline: Pipeline,
    scorer: Scorer,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
) -> Programs:
    """The programs; of ``state`` only the shapes are read, to keep it split over the devices as it is."""
    predict = make_guided_prediction(pipeline.unet.apply, config.sampling.guidance_scale)
    options = {"eta": config.sampling.eta, "beta": config.loss.beta, "clip_range": config.loss.clip_range}
    update = make_update(make_loss(predict, schedule, **options), optimizer, config.train.ema_decay or 0.0)
    everywhere, by_prompt = replicated(mesh), batch_sharding(mesh, axis=1)
    return Programs(
        pool=jax.jit(make_pool(config, pipeline, scorer, schedule, mesh), out_shardings=by_prompt),
        arrange=jax.jit(arrange, out_shardings=everywhere),
        exchange=jax.jit(make_exchange(mesh, config.train.minibatch_size)),
        update=jax.jit(update, donate_argnums=0, out_shardings=(weight_shardings(mesh, state), everywhere)),
    )


def collect(programs: Programs, params: Any, trained: Any, prompts: PromptBatch, key: jax.Array) -> Rollout:
    """Samples a batch of prompts and orders its pairs."""
    pairs, scores = programs.pool(params, trained, prompts, key)
    return Rollout(pairs, *programs.arrange(key, pairs.valid, scores))


def run_updates(
    config: ConfigDict,
    programs: Programs,
    state: TrainState,
    params: Any,
    prompts: PromptBatch,
    rollout: Rollout,
    num_valid: int,
) -> tuple[TrainState, list[UpdateMetrics]]:
    """One optimizer step for each minibatch of valid pairs; none if no pair is valid."""
    updates = []
    for start in range(0, num_valid, config.train.minibatch_size):
        minibatch = programs.exchange(prompts, rollout.pairs, rollout.order, rollout.num_valid, jnp.int32(start))
        state, metrics = programs.update(state, params, *minibatch)
        updates.append(metrics)
    return state, jax.device_get(updates)
