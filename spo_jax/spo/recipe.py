"""SPO from top to bottom: assemble; for each batch of prompts pool, updates, log; finish."""

from __future__ import annotations

import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.data.prompts import num_batches
from spo_jax.distributed.processes import is_main_process
from spo_jax.errors import notice
from spo_jax.formats.tokenizers import cut_warning, tokenizers_of
from spo_jax.runs.load import Weights
from spo_jax.runs.loop import Loop, RunFolder, Unit
from spo_jax.spo.assemble import SPO, assemble
from spo_jax.spo.evaluation import encode_held_out, finish, measure_curve, show_validation, write_result
from spo_jax.spo.rollout import rollout_metrics
from spo_jax.spo.steps import collect, draw, next_prompts, run_updates
from spo_jax.spo.update import clipped_warning, update_metrics


def train(config: ConfigDict, mesh: Mesh, folder: RunFolder) -> dict[str, object] | None:
    """Trains adapters and measures them, see ``methods.train``.

    Args:
      config: checked; what it names is on this machine.
      mesh: the devices.
      folder: gets ``config.json``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``validation/``,
        ``pytorch_lora_weights.safetensors`` (diffusers' format) and ``kohya_lora_weights.safetensors`` (that of most
        other programs), or after full fine-tuning a pipeline folder, ``model``; ``summary.json``, ``evaluation.csv``,
        ``report.html`` and a model card, ``README.md``.
    """
    began = time.time()
    spo = assemble(config, mesh, Weights)
    say(cut_texts(spo, spo.prompts, "training prompts"), cut_texts(spo, spo.held_out, "held-out prompts"))

    root, rows = jax.random.key(config.seed), []
    evaluation_key = rng.stream(root, "evaluation")
    unit = Unit("SPO", "batch", config.num_batches)
    with Loop(folder, spo.state, unit) as loop:
        if config.lora.rank:
            loop.on_save = lambda state: write_result(folder.path, spo, state.result)
        held_out = encode_held_out(spo)
        for batch in loop.steps():
            start, key = time.time(), rng.stream(root, "rollout", batch)
            prompts = next_prompts(spo, batch)
            pool = jax.block_until_ready(draw(spo, loop.state, prompts, key))
            drawn = time.time()
            rollout, num_valid = collect(spo, pool, prompts, key)
            if loop.preempted():
                break  # without updates of this batch: the next run makes the same pool again
            sampled = time.time()
            state, updates = run_updates(spo, loop.state, prompts, rollout, num_valid)
            updated = time.time()
            loop.advance(state)
            curve = {}
            if loop.due(config.evaluation.every):
                curve = measure_curve(spo, loop, held_out, evaluation_key)
            rows.append(
                {
                    "epoch": batch // num_batches(len(spo.prompts), config.prompts_per_batch),
                    **rollout_metrics(rollout, num_valid),
                    **update_metrics(updates),
                    "seconds_pool": drawn - start,
                    "seconds_score": sampled - drawn,
                    "seconds_update": updated - sampled,
                    **curve,
                }
            )
            loop.log(rows[-1], "loss", "preference_score_mean")
            say(clipped_warning(rows))
            if loop.preempted():
                break
            if loop.due(config.checkpoint.every):
                loop.save()
            if loop.due(config.validation.every):
                show_validation(spo, loop, folder.path, held_out, evaluation_key)
    return None if loop.preempted() else finish(spo, loop, folder.path, held_out, evaluation_key, began)


def cut_texts(spo: SPO, texts: list[str], what: str) -> str | None:
    """What to tell a user of texts that are longer than a tokenizer takes."""
    return cut_warning([*tokenizers_of(spo.pipeline), spo.tokenizer], texts, what)


def say(*sentences: str | None) -> None:
    """Says those that there are on stderr, once, in the first process."""
    for sentence in sentences:
        if sentence and is_main_process():
            notice(sentence)
