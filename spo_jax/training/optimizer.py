"""The optimizer of the trained variables."""

from __future__ import annotations

import optax
from ml_collections import ConfigDict

OPTIMIZERS = ("adamw", "adafactor")


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of ``config.train``, with a constant learning rate.

    Gradients are clipped only if ``max_grad_norm`` is set: the released runs ask for 1.0 but never clipped, see
    docs/decisions.md. With ``accumulation_steps`` > 1 the gradients of so many minibatches are averaged before a step.
    """
    if config.optimizer == "adafactor":
        # Factored second moments: the state of a matrix is a row and a column.
        optimizer = optax.adafactor(
            config.learning_rate, multiply_by_parameter_scale=False, weight_decay_rate=config.weight_decay
        )
    else:
        optimizer = optax.adamw(
            config.learning_rate,
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
