"""SPO from top to bottom: assemble; for each batch of prompts pool, updates, log; finish."""

from __future__ import annotations

import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.data.prompts import num_batches
from spo_jax.distributed.mesh import check_divisible, make_mesh
from spo_jax.distributed.processes import is_main_process
from spo_jax.errors import notice
from spo_jax.formats.lora import check_lora_files
from spo_jax.formats.tokenizers import cut_warning, tokenizers_of
from spo_jax.runs import wandb_run
from spo_jax.runs.artifacts import ready
from spo_jax.runs.load import Weights
from spo_jax.runs.loop import Loop, Unit
from spo_jax.spo.assemble import SPO, assemble
from spo_jax.spo.config import check
from spo_jax.spo.evaluation import encode_held_out, finish, show_validation, write_result
from spo_jax.spo.rollout import rollout_metrics
from spo_jax.spo.steps import collect, next_prompts, run_updates
from spo_jax.spo.update import clipped_warning, update_metrics


@wandb_run.finished
def train(config: ConfigDict, workdir: Path) -> dict[str, object] | None:
    """Trains adapters and measures them; goes on where an interrupted run of the same command stopped.

    Args:
      config: see ``spo/config.py`` and ``runs/config.py`` for every key.
      workdir: gets ``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``validation/``,
        ``pytorch_lora_weights.safetensors`` (diffusers' format) and ``kohya_lora_weights.safetensors`` (that of most
        other programs), or after full fine-tuning a pipeline folder, ``model``; ``summary.json``, ``evaluation.csv``,
        ``report.html`` and a model card, ``README.md``.

    Returns:
      What ``summary.json`` holds; None if SIGTERM has stopped the run, whose state is then saved.

    Raises:
      UserError: a mistake in config, files or workdir (before anything is written), or a loss that is not finite.
    """
    began = time.time()
    check(config)
    wandb_run.check(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_divisible("config.prompts_per_batch", config.prompts_per_batch, mesh)
    check_divisible("config.train.minibatch_size", config.train.minibatch_size, mesh)
    config, pins = ready(config, workdir)
    check_lora_files([config.lora.init] if config.lora.init else [])
    spo = assemble(config, mesh, Weights())
    say(cut_texts(spo, spo.prompts, "training prompts"), cut_texts(spo, spo.held_out, "held-out prompts"))

    root, rows = jax.random.key(config.seed), []
    evaluation_key = rng.stream(root, "evaluation")
    unit = Unit("SPO", "batch", config.num_batches)

    with Loop(config, workdir, pins, spo.state, unit) as loop:
        if config.lora.rank:
            loop.on_save = lambda state: write_result(workdir, spo, state.result)
        held_out = encode_held_out(spo)
        for batch in loop.steps():
            start = time.time()
            prompts = next_prompts(spo, batch)
            rollout, num_valid = collect(spo, loop.state, prompts, rng.stream(root, "rollout", batch))
            if loop.preempted():
                break  # without updates of this batch: the next run makes the same pool again
            sampled = time.time()
            state, updates = run_updates(spo, loop.state, prompts, rollout, num_valid)
            loop.advance(state)
            rows.append(
                {
                    "epoch": batch // num_batches(len(spo.prompts), config.prompts_per_batch),
                    **rollout_metrics(rollout, num_valid),
                    **update_metrics(updates),
                    "seconds_pool": sampled - start,
                    "seconds_update": time.time() - sampled,
                }
            )
            loop.log(rows[-1], "loss", "preference_score_mean")
            say(clipped_warning(rows))
            if loop.preempted():
                break
            if loop.due(config.checkpoint.every):
                loop.save()
            if loop.due(config.validation.every):
                show_validation(spo, loop, workdir, held_out, evaluation_key)
    return None if loop.preempted() else finish(spo, loop, workdir, held_out, evaluation_key, began)


def cut_texts(spo: SPO, texts: list[str], what: str) -> str | None:
    """What to tell a user of texts that are longer than a tokenizer takes."""
    return cut_warning([*tokenizers_of(spo.pipeline), spo.tokenizer], texts, what)


def say(*sentences: str | None) -> None:
    """Says those that there are on stderr, once, in the first process."""
    for sentence in sentences:
        if sentence and is_main_process():
            notice(sentence)
