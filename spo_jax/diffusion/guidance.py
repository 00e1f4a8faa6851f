"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

GuidedPrediction = Callable[..., jax.Array]


def make_guided_prediction(unet_apply: Callable[..., jax.Array], guidance_scale: float) -> GuidedPrediction:
    """``predict(variables, latents, timesteps, embeddings, negative_embeddings)`` with both halves in one batch.

    Args:
      unet_apply: ``(variables, latents [2n, h, w, c], timesteps [2n], context [2n, L, D]) -> [2n, h, w, c]``.
      guidance_scale: w in ``uncond + w (text - uncond)``.

    Returns:
      A function of variables, latents [n, h, w, c], timesteps [n], embeddings [n, L, D] and negative embeddings
      [1 or n, L, D] to the guided output float32 [n, h, w, c]. Gradients flow through both halves.
    """

    def predict(
        variables: Any,
        latents: Float[Array, "n h w c"],
        timesteps: Num[Array, " n"],
        embeddings: Float[Array, "n l d"],
        negative_embeddings: Float[Array, "m l d"],
    ) -> Float[Array, "n h w c"]:
        negative = jnp.broadcast_to(negative_embeddings, embeddings.shape)
        # The two halves of a prompt stand side by side: a batch sharded over devices needs no communication.
        pair = _interleave(negative, embeddings)
        output = unet_apply(variables, _interleave(latents, latents), _interleave(timesteps, timesteps), pair)
        output = output.astype(jnp.float32).reshape(latents.shape[0], 2, *latents.shape[1:])
        return output[:, 0] + guidance_scale * (output[:, 1] - output[:, 0])

    return predict


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])
