"""Classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PyTree

from spo_jax.types import AddedConditions, PromptBatch


class Denoiser(Protocol):
    """A network: ``unet.apply``. SDXL's has a fifth argument."""

    def __call__(
        self, variables: PyTree, latents: jax.Array, timesteps: jax.Array, context: jax.Array, *added: AddedConditions
    ) -> jax.Array:
        """The output for latents [n, h, w, c] at timesteps [n], context [n, L, D] -> [n, h, w, c]."""


# ``(variables, latents [n, h, w, c], timesteps [n], prompts of n rows) -> float32 [n, h, w, c]``.
GuidedPrediction = Callable[[PyTree, jax.Array, jax.Array, PromptBatch], jax.Array]


def make_guided_prediction(denoiser: Denoiser, guidance_scale: float) -> GuidedPrediction:
    """``uncond + w (text - uncond)``, both in one batch; with w = 1 that is ``text``, and there is no second half.

    Gradients flow through both halves.

    Args:
      denoiser: the network.
      guidance_scale: w.
    """

    def predict(
        variables: PyTree, latents: Float[Array, "n h w c"], timesteps: Num[Array, " n"], prompts: PromptBatch
    ) -> Float[Array, "n h w c"]:
        if guidance_scale == 1.0:
            added = () if prompts.added is None else (prompts.added,)
            return denoiser(variables, latents, timesteps, prompts.embeddings, *added).astype(jnp.float32)

        # The two halves of a prompt stand side by side: a batch sharded over devices needs no communication.
        def halves(negative: PyTree, positive: PyTree) -> PyTree:
            return jax.tree.map(lambda n, p: interleave(jnp.broadcast_to(n, p.shape), p), negative, positive)

        conditions = [halves(prompts.negative_embeddings, prompts.embeddings)]
        if prompts.added is not None:
            conditions.append(halves(prompts.negative_added, prompts.added))
        output = denoiser(variables, interleave(latents, latents), interleave(timesteps, timesteps), *conditions)
        output = output.astype(jnp.float32).reshape(latents.shape[0], 2, *latents.shape[1:])
        return output[:, 0] + guidance_scale * (output[:, 1] - output[:, 0])

    return predict


def interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """[n, ...] and [n, ...] to [2n, ...]: row i of the first, then row i of the second."""
    return jnp.stack([first, second], axis=1).reshape(2 * first.shape[0], *first.shape[1:])
