"""Pairs of images at a timestep: with noise, and as the base model sees them then.

Both images of a pair get the same timestep and the same noise (SPO, section 3.2; Diffusion-DPO). A preference model is
shown the clean images that the frozen base model predicts from them in one guided step. Everything here is a function
of its arguments; no gradient flows into the frozen networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PyTree, Shaped, UInt8

from spo_jax import rng
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.process import Process
from spo_jax.distributed.pieces import map_in_pieces
from spo_jax.formats.pipeline import Pipeline
from spo_jax.sampling.generate import make_decode
from spo_jax.types import PromptBatch

# ``(params, images uint8 [B, 2, H, W, 3], timesteps [B], keys [B]) -> (latents with noise float32 [B, 2, h, w, c], the
# noise that both have [B, h, w, c])``; reads ``params["vae"]``.
AddNoise = Callable[[dict[str, PyTree], jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# ``(params, images, prompts, timesteps, keys) -> images float32 [B, 2, H, W, 3]``, about in [-1, 1].
PredictClean = Callable[[dict[str, PyTree], jax.Array, PromptBatch, jax.Array, jax.Array], jax.Array]


def make_add_noise(pipeline: Pipeline, process: Process) -> AddNoise:
    """Encodes images, each from a sample of the autoencoder's posterior, and adds noise.

    There is a key for each pair, so what it draws does not depend on the batch that it is in.
    """
    vae = pipeline.vae

    def encode(params: dict[str, PyTree], images: jax.Array, keys: jax.Array) -> jax.Array:
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        flat = pixels.reshape(-1, *pixels.shape[2:])
        mean, log_variance = vae.apply({"params": params["vae"]}, flat, method=vae.encode)
        mean, log_variance = (x.astype(jnp.float32).reshape(-1, 2, *x.shape[1:]) for x in (mean, log_variance))
        noise = jax.vmap(lambda key: jax.random.normal(rng.stream(key, "posterior"), mean.shape[1:]))(keys)
        return (mean + jnp.exp(0.5 * log_variance) * noise) * vae.scaling_factor

    def add_noise(
        params: dict[str, PyTree],
        images: UInt8[Array, "b 2 H W 3"],
        timesteps: Int[Array, " b"],
        keys: Shaped[Array, " b"],
    ) -> tuple[Float[Array, "b 2 h w c"], Float[Array, "b h w c"]]:
        latents = encode(params, images, keys)
        noise = jax.vmap(lambda key: jax.random.normal(rng.stream(key, "noise"), latents.shape[2:]))(keys)
        return jax.vmap(process.add_noise)(latents, noise[:, None], timesteps), noise

    return add_noise


def make_predict_clean(pipeline: Pipeline, process: Process, guidance_scale: float, chunk: int = 0) -> PredictClean:
    """The prediction of a pipeline.

    Args:
      pipeline: the base model.
      process: its noise; the number of sampling steps plays no part.
      guidance_scale: w of classifier-free guidance.
      chunk: pairs that go through autoencoder and UNet at a time, a divisor of b and a multiple of the number of
        devices; 0 for all of them. The numbers are the same.

    Returns:
      A function of ``params`` (``"unet"``, ``"vae"``), images, prompts of b rows, timesteps, and a key for each pair:
      so its noise does not depend on the batch that it is in.
    """
    predict_guided = make_guided_prediction(pipeline.unet.apply, guidance_scale)
    decode = make_decode(pipeline)
    add_noise = make_add_noise(pipeline, process)

    def predict_together(
        params: dict[str, PyTree], images: jax.Array, prompts: PromptBatch, timesteps: jax.Array, keys: jax.Array
    ) -> jax.Array:
        noisy, _ = add_noise(params, images, timesteps, keys)
        flat = noisy.reshape(-1, *noisy.shape[2:])
        times = jnp.repeat(timesteps, 2)
        both = prompts.map_rows(lambda rows: jnp.repeat(rows, 2, axis=0))
        output = predict_guided({"params": params["unet"]}, flat, times, both)
        x0, _ = jax.vmap(process.to_x0_and_noise)(output, flat, times)
        clean = decode(params, x0)
        return clean.reshape(-1, 2, *clean.shape[1:])

    def predict_clean(
        params: dict[str, PyTree],
        images: UInt8[Array, "b 2 H W 3"],
        prompts: PromptBatch,
        timesteps: Int[Array, " b"],
        keys: Shaped[Array, " b"],
    ) -> Float[Array, "b 2 H W 3"]:
        def some(rows: PyTree) -> jax.Array:
            images, (embeddings, added), timesteps, keys = rows
            some_prompts = dataclasses.replace(prompts, embeddings=embeddings, added=added)
            return predict_together(params, images, some_prompts, timesteps, keys)

        rows = (images, (prompts.embeddings, prompts.added), timesteps, keys)
        return jax.lax.stop_gradient(map_in_pieces(some, rows, chunk or len(images)))

    return predict_clean


def pair_keys(root: jax.Array, positions: Integer[Array, " b"]) -> jax.Array:
    """A key for each pair, by its place in the stream of records: the same in any batch and on any device."""
    return jax.vmap(lambda position: jax.random.fold_in(root, position))(positions)
