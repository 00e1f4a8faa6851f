"""The loop that the four emoji models are trained with: AdamW, cosine schedule, averaged weights, resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from spo_jax import rng
from spo_jax.runs import checkpoint

LossFn = Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class FitState:
    """Parameters, their exponential moving average and the optimizer's state after ``step`` updates."""

    step: jax.Array
    params: Any
    average: Any
    opt_state: Any


def fit(
    name: str,
    params: Any,
    loss_fn: LossFn,
    make_batch: Callable[[int], Any],
    *,
    num_steps: int,
    learning_rate: float,
    workdir: Path,
    seed: int,
    average_decay: float = 0.999,
    save_every: int = 500,
    log_every: int = 50,
) -> Any:
    """Minimises ``loss_fn`` and returns the averaged parameters.

    Args:
      name: names the checkpoint folder and the log, ``workdir/name`` and ``workdir/name.jsonl``.
      params: initial parameters, float32.
      loss_fn: ``(params, batch, key) -> (loss, metrics)``.
      make_batch: the batch of a step; a function of the step alone, so that a killed run repeats nothing.
      num_steps: number of updates.
      learning_rate: peak of the schedule: 2 % linear warm-up, then cosine to zero.
      workdir: where checkpoints and the log go; a run that was killed goes on from the newest checkpoint.
      seed: root of all random keys.
    """
    warmup = max(1, num_steps // 50)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, num_steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2))
    root = rng.stream(jax.random.key(seed), name)

    @jax.jit
    def update(state: FitState, batch: Any) -> tuple[FitState, dict[str, jax.Array]]:
        key = jax.random.fold_in(root, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, state.average, new)
        return FitState(state.step + 1, new, average, opt_state), {"loss": loss, **metrics}

    state = FitState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))
    manager = checkpoint.make_manager(workdir / name, keep=1)
    restored = checkpoint.restore_latest(manager, state)
    if restored is not None:
        state = restored[0]
    start, began, window = int(state.step), time.time(), []
    with open(workdir / f"{name}.jsonl", "a", encoding="utf-8") as log:
        for step in range(start, num_steps):
            state, metrics = update(state, make_batch(step))
            window.append(metrics)
            if (step + 1) % log_every == 0 or step + 1 == num_steps:
                row = {k: float(np.mean([m[k] for m in window])) for k in metrics}
                row = {"step": step + 1, **row, "seconds": round(time.time() - began, 1)}
                print(name, json.dumps(row), flush=True)
                print(json.dumps(row), file=log, flush=True)
                window = []
            if (step + 1) % save_every == 0 or step + 1 == num_steps:
                checkpoint.save(manager, step + 1, state, {})
    checkpoint.close(manager)
    return state.average
