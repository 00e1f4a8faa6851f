"""The optimizer of the trained variables, and the learning rate over its steps."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from spo_jax.runs.state import Optimizer


def make_optimizer(config: ConfigDict, schedule: optax.Schedule | None = None) -> Optimizer:
    """The optimizer of ``config.train``, with the decay of its average.

    Its learning rate is constant unless a ``schedule`` over its steps is given. Gradients are clipped only if
    ``max_grad_norm`` is set: the released runs of SPO ask for 1.0 but never clipped, see docs/decisions.md. With
    ``accumulation_steps`` > 1 the gradients of so many minibatches are averaged before a step.
    """
    learning_rate = config.learning_rate if schedule is None else schedule
    if config.optimizer == "adafactor":
        optimizer = _adafactor(learning_rate, config.weight_decay)
    else:
        optimizer = optax.adamw(
            learning_rate,
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
    if config.max_grad_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    if config.accumulation_steps > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulation_steps).gradient_transformation()
    return Optimizer(optimizer, config.ema_decay or 0.0)


def _adafactor(learning_rate: float | optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """``optax.adafactor``, whose state of a matrix is a row and a column of second moments, with AdamW's decay.

    Optax's own decay is not multiplied by the learning rate: at 0.3 it would take 30 % of the weights away in a step.
    """
    clip, decay = optax.clip_by_block_rms(1.0), optax.add_decayed_weights(weight_decay)

    def clip_and_decay(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        clipped, _ = clip.update(updates, clip.init(params), params)
        return decay.update(clipped, decay.init(params), params)[0]

    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.stateless(clip_and_decay),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        optax.identity(),  # where optax has the decay; checkpoints know the state of each by its place
        optax.scale(-1.0),
    )


def warmup_constant(learning_rate: float, warmup_steps: int) -> optax.Schedule:
    """``step -> learning rate``: ``learning_rate * min(1, step / warmup_steps)``, as in transformers; step from 0."""
    return optax.linear_schedule(0.0, learning_rate, warmup_steps) if warmup_steps else lambda _: learning_rate


def warmup_linear_decay(
    learning_rate: float, warmup_steps: int, num_steps: int, warmup: str = "linear"
) -> optax.Schedule:
    """``step -> learning rate``: up in W = ``warmup_steps``, then linearly down to zero at T = ``num_steps``.

    ``warmup`` "linear" rises by step / W from zero, as in transformers. "log" is DeepSpeed's WarmupDecayLR, which the
    released preference models were trained with: it is asked for the first time after the first update, which has the
    optimizer's own learning rate. Its factors are 1 at step 0, then log(step) / log(W) up to step W, and
    (T - step + 1) / (T - W) from there; W is at least 2.
    """
    if warmup == "linear":
        rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        fall = optax.linear_schedule(learning_rate, 0.0, num_steps - warmup_steps)
        return optax.join_schedules([rise, fall], [warmup_steps])
    top = max(2, warmup_steps)

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.log(jnp.maximum(step, 1)) / math.log(top)
        falling = jnp.maximum(num_steps - step + 1, 0) / max(1, num_steps - top)
        return learning_rate * jnp.where(step == 0, 1.0, jnp.where(step <= top, rising, falling))

    return rate
