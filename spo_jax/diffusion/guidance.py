"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from spo_jax.types import AddedConditions

GuidedPrediction = Callable[..., jax.Array]


def make_guided_prediction(unet_apply: Callable[..., jax.Array], guidance_scale: float) -> GuidedPrediction:
    """``predict(variables, latents, timesteps, *prompts.conditions)`` with both halves in one batch.

    Args:
      unet_apply: ``(variables, latents [2n, h, w, c], timesteps [2n], context [2n, L, D]) -> [2n, h, w, c]``; for SDXL
        a fifth argument brings the ``AddedConditions`` of 2n pictures.
      guidance_scale: w in ``uncond + w (text - uncond)``.

    Returns:
      A function of variables, latents [n, h, w, c], timesteps [n], embeddings [n, L, D], negative embeddings
      [1 or n, L, D] and, for SDXL, added conditions of n and of 1 or n pictures, to the guided output float32
      [n, h, w, c]. Gradients flow through both halves.
    """

    def predict(
        variables: Any,
        latents: Float[Array, "n h w c"],
        timesteps: Num[Array, " n"],
        embeddings: Float[Array, "n l d"],
        negative_embeddings: Float[Array, "m l d"],
        added: AddedConditions | None = None,
        negative_added: AddedConditions | None = None,
    ) -> Float[Array, "n h w c"]:
        # The two halves of a prompt stand side by side: a batch sharded over devices needs no communication.
        def halves(negative, positive):
            return jax.tree.map(lambda n, p: interleave(jnp.broadcast_to(n, p.shape), p), negative, positive)

        conditions = [halves(negative_embeddings, embeddings)]
        if added is not None:
            conditions.append(halves(negative_added, added))
        output = unet_apply(variables, interleave(latents, latents), interleave(timesteps, timesteps), *conditions)
        output = output.astype(jnp.float32).reshape(latents.shape[0], 2, *latents.shape[1:])
        return output[:, 0] + guidance_scale * (output[:, 1] - output[:, 0])

    return predict


def interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """[n, ...] and [n, ...] to [2n, ...]: row i of the first, then row i of the second."""
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])
