"""The optimizer of the trained variables."""

from __future__ import annotations

import optax
from ml_collections import ConfigDict

OPTIMIZERS = ("adamw", "adafactor")


def make_optimizer(config: ConfigDict, schedule: optax.Schedule | None = None) -> optax.GradientTransformation:
    """The optimizer of ``config.train``; its learning rate is constant unless a ``schedule`` over its steps is given.

    Gradients are clipped only if ``max_grad_norm`` is set: the released runs of SPO ask for 1.0 but never clipped, see
    docs/decisions.md. With ``accumulation_steps`` > 1 the gradients of so many minibatches are averaged before a step.
    """
    learning_rate = config.learning_rate if schedule is None else schedule
    if config.optimizer == "adafactor":
        # Factored second moments: the state of a matrix is a row and a column.
        optimizer = optax.adafactor(
            learning_rate, multiply_by_parameter_scale=False, weight_decay_rate=config.weight_decay
        )
    else:
        optimizer = optax.adamw(
            learning_rate,
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
    if config.max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optimizer)
    if config.accumulation_steps > 1:
        optimizer = optax.MultiSteps(optimizer, config.accumulation_steps).gradient_transformation()
    return optimizer


def warmup_linear_decay(learning_rate: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """From zero up to ``learning_rate`` in ``warmup_steps`` steps, then linearly down to zero at ``num_steps``."""
    rise = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    fall = optax.linear_schedule(learning_rate, 0.0, num_steps - warmup_steps)
    return optax.join_schedules([rise, fall], [warmup_steps])
