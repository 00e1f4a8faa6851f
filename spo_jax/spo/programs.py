"""What a run computes: its first state, and its programs, compiled once each. ``spo_jax.plan`` compiles the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import Schedule
from spo_jax.distributed.mesh import batch_sharding, jit_on, replicated
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.formats.lora import starting_lora
from spo_jax.formats.pipeline import Pipeline
from spo_jax.preference.scorers import Scorer
from spo_jax.spo.exchange import arrange, make_exchange
from spo_jax.spo.rollout import Rollout, make_pool
from spo_jax.spo.update import UpdateMetrics, make_loss, make_update
from spo_jax.types import PreferencePairs, PromptBatch, TrainState

# Frozen weights that programs read; evaluation reads those of the pool and the judge.
ENCODE_PARTS = ("text_encoder", "text_encoder_2", "scorer")
POOL_PARTS = ("unet", "vae", "scorer")


def starting_state(
    config: ConfigDict, optimizer: optax.GradientTransformation, key: jax.Array, unet_params: Any
) -> TrainState:
    """The state before the first update: adapters, or with rank 0 a float32 copy of the whole UNet."""
    trained: Any
    if config.lora.rank == 0:
        trained = {"params": jax.tree.map(lambda x: jnp.array(x, jnp.float32), unet_params)}
    else:
        trained = {"lora": starting_lora(key, unet_params, config.lora.rank, config.lora.init or None)}
    # A copy, because the update gives the buffers of the old state away.
    average = None if not config.train.ema_decay else jax.tree.map(jnp.copy, trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), average)


def untrained(trained: Any) -> Any:
    """The base model in the form of ``trained``: adapters of zeros, so that the program for tuned adapters serves it.

    In full fine-tuning that is {}: nothing is laid over the base weights.
    """
    adapters = {name: part for name, part in trained.items() if name == "lora"}
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), adapters)


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
        pool=jit_on(mesh, make_pool(config, pipeline, scorer, schedule, mesh), out_shardings=by_prompt),
        arrange=jax.jit(arrange, out_shardings=everywhere),
        exchange=jax.jit(make_exchange(mesh, config.train.minibatch_size)),
        update=jit_on(mesh, update, donate_argnums=0, out_shardings=(weight_shardings(mesh, state), everywhere)),
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
