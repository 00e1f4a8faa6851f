"""Step-aware preference optimization, from top to bottom: mesh, models, data, state, restore, loop, evidence."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tqdm import tqdm

from spo_jax import rng
from spo_jax.data.prompts import batch_indices, num_batches, read_prompts
from spo_jax.diffusion.schedule import check_trainable, make_schedule
from spo_jax.distributed.mesh import check_divisible, fetch, jit_on, make_mesh
from spo_jax.distributed.offload import to_device, weight_placement
from spo_jax.distributed.pieces import piece_size
from spo_jax.distributed.processes import is_main_process
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.evaluation.measure import Measured, make_measure, summarize
from spo_jax.formats.base import base_of_config, read_base
from spo_jax.formats.lora import check_lora_files
from spo_jax.formats.lora_write import write_kohya, write_lora
from spo_jax.formats.pipeline import Pipeline, read_clip, with_image_size
from spo_jax.formats.scorers import check_function, fitted_to, make_scorer, tokenizer_of
from spo_jax.formats.tokenizers import cut_warning, tokenize, tokenizers_of
from spo_jax.formats.write_pipeline import write_pipeline
from spo_jax.images import grid, to_uint8, write_png
from spo_jax.preference.scorers import make_clip_scorer
from spo_jax.runs import checkpoint, preemption, wandb_run
from spo_jax.runs.artifacts import ready
from spo_jax.runs.metrics import (
    METRICS_FILE,
    MetricsWriter,
    check_finite,
    clipped_warning,
    nothing_learned,
    read_metrics,
    write_summary,
)
from spo_jax.runs.model_card import write_model_card
from spo_jax.runs.optimizer import make_optimizer
from spo_jax.sampling.encode import encode_prompts, make_encode, shard_prompts
from spo_jax.spo.config import check
from spo_jax.spo.programs import (
    ENCODE_PARTS,
    POOL_PARTS,
    collect,
    compile_programs,
    run_updates,
    starting_state,
    untrained,
)
from spo_jax.spo.report import write_report
from spo_jax.spo.rollout import rollout_metrics, time_score
from spo_jax.spo.update import update_metrics
from spo_jax.types import PromptBatch

NUM_REPORT_PICTURES = 24
READABLE_WIDTH = 96  # pixels; smaller pictures, as of the emoji, are enlarged on validation sheets


@wandb_run.finished
def train(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Trains adapters and measures them; going on where an interrupted run of the same command stopped.

    Args:
      config: see ``spo/config.py`` and ``runs/config.py`` for every key.
      workdir: gets ``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``validation/``,
        ``pytorch_lora_weights.safetensors`` (diffusers' format) and ``kohya_lora_weights.safetensors`` (that of most
        other programs), or after full fine-tuning a pipeline folder, ``model``; ``summary.json``, ``report.html`` and a
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
    check_divisible("config.prompts_per_batch", config.prompts_per_batch, mesh)
    check_divisible("config.train.minibatch_size", config.train.minibatch_size, mesh)
    placement = weight_placement(mesh, offload=config.offload)

    # ---------------------------------------------------------------------------------------------------------- data
    config, pins = ready(config, workdir)
    prompts = read_prompts(config.prompts)
    check_lora_files([config.lora.init] if config.lora.init else [])
    held_out = read_prompts(config.evaluation.prompts)[: config.evaluation.num_prompts]

    # -------------------------------------------------------------------------------------------------------- models
    dtype = jnp.dtype(config.dtype)
    pipeline = read_base(base_of_config(config), dtype, sharding=placement)
    pipeline = with_image_size(pipeline, config.sampling.height, config.sampling.width)
    pipeline = dataclasses.replace(pipeline, unet=pipeline.unet.clone(remat=config.remat))
    options: dict[str, Any] = {"dtype": dtype, "sharding": placement}
    scorer_tokenizer = tokenizer_of(config.scorer.tokenizer, pipeline)
    check_function(
        config.scorer.fn,
        num_images=piece_size(
            config.prompts_per_batch * config.sampling.num_candidates, mesh.size, config.scorer.chunk
        ),
        image_size=pipeline.image_size,
        tokenizer=scorer_tokenizer,
    )
    scorer, scorer_params = make_scorer(config.scorer.path, config.scorer.fn, **options)
    scorer_tokenizer = fitted_to(scorer, scorer_tokenizer)
    options["sharding"] = lambda path, shape: placement(("judge", *path), shape)
    judge_clip, judge_params = read_clip(config.evaluation.judge, step_aware=False, **options)
    judge = make_clip_scorer(judge_clip)
    judge_tokenizer = fitted_to(judge, pipeline.tokenizer)
    readers = [*tokenizers_of(pipeline), scorer_tokenizer]
    say(cut_warning(readers, prompts, "training prompts"), cut_warning(readers, held_out, "held-out prompts"))
    params = {**pipeline.params, "scorer": scorer_params, "judge": judge_params}
    pool_params = {name: params[name] for name in POOL_PARTS}
    schedule = make_schedule(pipeline.scheduler_config, config.sampling.num_steps)
    check_trainable(schedule)
    encode = jit_on(mesh, make_encode(pipeline, scorer))

    # --------------------------------------------------------------------------------------------------------- state
    root = jax.random.key(config.seed)
    optimizer = make_optimizer(config.train)
    state = starting_state(config, optimizer, rng.stream(root, "lora"), params["unet"])
    state = jax.device_put(state, weight_shardings(mesh, state))

    # ------------------------------------------------------------------------------------------------------- restore
    checkpoint.check_workdir(workdir, config.to_dict(), pins)
    manager = checkpoint.make_manager(workdir / "checkpoints", config.checkpoint.keep)
    restored = checkpoint.restore_latest(manager, state)
    first_batch, seconds_before = 0, 0.0
    if restored is not None:
        state, extra = restored
        first_batch, seconds_before = extra["batch"], extra["seconds"]
    finished = saved = first_batch
    run = wandb_run.start(config, workdir, first_batch)

    # ---------------------------------------------------------------------------------------------------------- loop
    programs = compile_programs(config, pipeline, scorer, schedule, optimizer, mesh, state)
    measure_prompts = make_measure(
        pipeline,
        scorer,
        judge,
        schedule,
        mesh,
        guidance_scale=config.sampling.guidance_scale,
        eta=config.evaluation.eta,
        batch_size=min(config.evaluation.batch_size, len(held_out)),
        chunk=config.scorer.chunk,
    )

    def encode_texts(texts: list[str]) -> PromptBatch:
        some = to_device({name: part for name, part in params.items() if name in ENCODE_PARTS})
        return encode_prompts(encode, some, pipeline, scorer_tokenizer, texts)

    held_out_batch = encode_texts(held_out)
    judge_text = jit_on(mesh, judge.encode_text)(to_device(params["judge"]), tokenize(judge_tokenizer, held_out))
    evaluation_key = rng.stream(root, "evaluation")

    def measure(trained: Any, prompts: PromptBatch) -> Measured:
        some = pool_params | {"judge": to_device(params["judge"])}
        return measure_prompts(some, trained, prompts, judge_text, evaluation_key)

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
                write_result(workdir, state.result, pipeline)
            saved = finished

    with (
        preemption.watch() as preempted,
        MetricsWriter(workdir, first_batch, run, enabled=main) as writer,
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
            prompt_batch = shard_prompts(encode_texts([prompts[i] for i in indices]), mesh)
            if batch == first_batch:
                seconds_per_score = time_score(config, pipeline, scorer, pool_params, prompt_batch, mesh)
            start = time.time()
            rollout = collect(programs, pool_params, state.trained, prompt_batch, rng.stream(root, "rollout", batch))
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
                shown = measure(state.result, some)
                if main:
                    sheet = grid(to_uint8(shown.images))
                    zoom = max(1, READABLE_WIDTH // shown.images.shape[2])
                    write_png(workdir / "validation" / f"batch_{finished:06d}.png", sheet, zoom)
                    writer.write_image(finished, "validation", sheet)
        save()
        checkpoint.close(manager)
        if preempted():
            preemption.say_stopped("batch", finished)
            return None
    seconds_training = seconds_before + time.time() - training_began
    write_result(workdir, state.result, pipeline)
    say(nothing_learned(config, int(state.step), fetch(state.result.get("lora"))))

    # ------------------------------------------------------------------------------------------------------ evidence
    base = measure(untrained(state.result), held_out_batch)
    tuned = measure(state.result, held_out_batch)
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
    run.write_summary(summary)
    pictures = zip(held_out, to_uint8(base.images), to_uint8(tuned.images), strict=True)
    write_report(
        workdir / "report.html",
        summary=summary,
        metrics=read_metrics(workdir / METRICS_FILE),
        samples=list(pictures)[:NUM_REPORT_PICTURES],
    )
    xl = pipeline.text_encoder_2 is not None
    write_model_card(workdir / "README.md", summary=summary, num_prompts=len(prompts), xl=xl)
    print(
        f"Tuned model wins on {summary['win_rate']:.1%} of {len(held_out)} held-out prompts by colourfulness, "
        f"{summary['win_rate_preference_score']:.1%} by preference score.\n"
        f"Report: {workdir / 'report.html'}\nNumbers: {workdir / 'summary.json'}\nAdapters: {workdir}"
    )
    return summary


# ------------------------------------------------------------------------------------------------------------ pieces
def say(*warnings: str | None) -> None:
    """Prints those that there are on stderr, in the first process."""
    for warning in warnings:
        if warning and is_main_process():
            print(f"spo_jax: {warning}", file=sys.stderr)


def write_result(workdir: Path, trained: Any, pipeline: Pipeline) -> None:
    """Writes the two LoRA files, or after full fine-tuning the pipeline folder ``model``.

    All processes must call this; the first one writes.
    """
    trained = fetch(trained)
    if not is_main_process():
        return
    if "lora" in trained:
        lora = {"unet": trained["lora"]}
        write_lora(workdir, lora)
        kind = str(pipeline.scheduler_config.get("prediction_type", "epsilon"))
        write_kohya(workdir, lora, pipeline.params["unet"], prediction_type=kind, image_size=pipeline.image_size)
    elif not (workdir / "model").exists():
        options: dict[str, Any] = {"replaced": pipeline.replaced, "variant": pipeline.variant}
        write_pipeline(workdir / "model", pipeline.folder, trained["params"], **options)
