"""The optimizer of the adapters."""

from __future__ import annotations

import optax
from ml_collections import ConfigDict


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with a constant learning rate, and gradient clipping only if ``max_grad_norm`` is set (``config.train``).

    The released runs ask for clipping at 1.0 but never clipped; see docs/decisions.md.
    """
    adamw = optax.adamw(
        config.learning_rate,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    if config.max_grad_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
