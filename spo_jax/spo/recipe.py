"""SPO from top to bottom: assemble; for each batch of prompts pool, updates, log; finish."""

from __future__ import annotations

import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spo_jax import rng
from spo_jax.data.prompts import num_batches
from spo_jax.distributed.processes import say
from spo_jax.runs.held_out import cut_texts, encode_held_out, measure_curve, show_validation
from spo_jax.runs.load import Weights
from spo_jax.runs.loop import Loop, RunFolder, Unit
from spo_jax.runs.result import finish, write_result
from spo_jax.spo.assemble import assemble
from spo_jax.spo.rollout import rollout_metrics
from spo_jax.spo.steps import collect, draw, next_prompts, run_updates
from spo_jax.spo.update import clipped_warning, nothing_learned, update_metrics
from spo_jax.spo.words import words_of


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
    unit = Unit("SPO", "batch", config.num_batches)
    with Loop(folder, spo.state, unit) as loop:
        if config.lora.rank:
            loop.on_save = lambda state: write_result(folder.path, spo.pipeline, state.result)
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
                curve = measure_curve(spo, loop, held_out)
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
                show_validation(spo, loop, held_out)
    if loop.preempted():
        return None
    unlearned = nothing_learned(config, int(loop.state.step))
    return finish(spo, loop, held_out, words_of(config, len(spo.prompts)), began, unlearned=unlearned)
