"""The three stages of ``examples.emoji_world.build`` that need the emoji font: CLIP, autoencoder, UNet."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from examples.emoji_world import pictures
from examples.emoji_world.fit import fit
from examples.emoji_world.model_configs import (
    CLIP_CONFIG,
    IMAGE_SIZE,
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    TEXT_CONFIG,
    UNET_CONFIG,
    VAE_CONFIG,
)
from examples.emoji_world.tokenizer import write_tokenizer
from spo_jax import rng
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.emoji import world
from spo_jax.formats import pipeline as pipelines
from spo_jax.formats import tokenizers
from spo_jax.formats.safetensors_io import write_params
from spo_jax.models import AutoencoderKL, CLIPModel, UNet2DConditionModel
from spo_jax.preference.scorers import preprocess_images

CLIP_BATCH_SIZE = 128
VAE_BATCH_SIZE = 32
UNET_BATCH_SIZE = 64
LATENT_BANK = 65_536  # pictures that are encoded once and then serve the whole training of the UNet
CAPTION_DROPOUT = 0.1
KL_WEIGHT = 1e-4
MIN_SNR_GAMMA = 5.0  # arXiv 2303.09556


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a config file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, *stream])


def _init(module: Any, seed: int, *inputs: Any) -> Any:
    return jax.jit(module.init)(rng.stream(jax.random.key(seed), "init"), *inputs)["params"]


# ------------------------------------------------------------------------------------------------------------- CLIP
def train_clip(workdir: Path, *, seed: int, num_steps: int = 1500) -> None:
    """Contrastive training (arXiv 2103.00020) on pictures of distinct captions; writes clip, text_encoder, tokenizer.

    It learns every caption, the held-out ones too: it is the judge of alignment.
    """
    model = workdir / "model"
    write_tokenizer(model / "tokenizer")
    (workdir / "prompts").mkdir(exist_ok=True)
    for name, text in world.prompt_files().items():
        (workdir / "prompts" / name).write_text(text, encoding="utf-8")
    tokenizer = tokenizers.read_tokenizer(model / "tokenizer")
    prompts = np.asarray(world.ALL_PROMPTS)
    tokens = tokenizers.tokenize(tokenizer, world.captions(world.ALL_PROMPTS))
    clip = CLIPModel.from_config(CLIP_CONFIG, step_aware=False)
    params = _init(clip, seed, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)), jnp.zeros((1, tokens.shape[1]), jnp.int32))

    def make_batch(step: int) -> tuple[Any, Any]:
        generator = _generator(seed, 1, step)
        index = generator.choice(len(prompts), CLIP_BATCH_SIZE, replace=False)
        concept, color = prompts[index].T
        return pictures.compose(generator, concept, color, IMAGE_SIZE), tokens[index]

    def loss_fn(params, batch, key):
        images, tokens = batch
        pixels = preprocess_images(_blemish(key, images), IMAGE_SIZE)
        image, text, scale = clip.apply({"params": params}, pixels, tokens)
        logits = scale * image @ text.T
        labels = jnp.arange(logits.shape[0])
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)).mean() / 2
        return loss, {"accuracy": (logits.argmax(-1) == labels).mean(), "scale": scale}

    params = fit(
        "clip", params, loss_fn, make_batch, num_steps=num_steps, learning_rate=1e-3, workdir=workdir, seed=seed
    )
    write_json(model / "clip" / "config.json", CLIP_CONFIG)
    write_params(model / "clip" / "model.safetensors", params, dtype=np.float16)
    write_json(model / "text_encoder" / "config.json", TEXT_CONFIG)
    write_params(model / "text_encoder" / "model.safetensors", {"text_model": params["text_model"]}, dtype=np.float16)


def _blemish(key: jax.Array, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Slight random blur and noise, because the judge will look at generated pictures, not at clean ones."""
    blur_key, noise_key, field_key = jax.random.split(key, 3)
    shape = (images.shape[0], 1, 1, 1)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    blurred = jax.lax.reduce_window(padded, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "VALID") / 9
    images = images + jax.random.uniform(blur_key, shape) * (blurred - images)
    return images + 0.15 * jax.random.uniform(noise_key, shape) * jax.random.normal(field_key, images.shape)


# ------------------------------------------------------------------------------------------------------ autoencoder
def train_vae(workdir: Path, *, seed: int, num_steps: int = 2400) -> None:
    """Squared error, a little absolute error and a very small KL term; then again, warm, with the squared error alone.

    Reports the PSNR on backgrounds that training did not show.
    """
    model = workdir / "model"
    vae = AutoencoderKL.from_config(VAE_CONFIG)
    params = _init(vae, seed, jnp.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3)))

    def make_batch(step: int) -> Any:
        return pictures.training_batch(_generator(seed, 2, step), VAE_BATCH_SIZE, world.TRAIN_PROMPTS, IMAGE_SIZE)[0]

    def loss_fn(params, images, key, absolute_weight):
        mean, log_variance = vae.apply({"params": params}, images, method=vae.encode)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        error = vae.apply({"params": params}, latents, method=vae.decode) - images
        squared = jnp.square(error).mean()
        kl = 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance).mean()
        loss = squared + absolute_weight * jnp.abs(error).mean() + KL_WEIGHT * kl
        return loss, {"psnr": 10 * jnp.log10(4 / squared), "kl": kl}

    # The second cycle was added because the first reached 24.1 dB on unseen backgrounds.
    for name, absolute_weight, first_step in (("vae", 0.1, 0), ("vae_restart", 0.0, num_steps)):
        params = fit(
            name,
            params,
            functools.partial(loss_fn, absolute_weight=absolute_weight),
            functools.partial(_shifted, make_batch, first_step),
            num_steps=num_steps,
            learning_rate=2e-3,
            workdir=workdir,
            seed=seed,
        )
    encode = jax.jit(lambda images: vae.apply({"params": params}, images, method=vae.encode))
    images = pictures.training_batch(_generator(seed, 3), 2048, world.TRAIN_PROMPTS, IMAGE_SIZE)[0]
    mean, log_variance = encode(images)
    scale = float(1 / np.sqrt(np.var(mean) + np.mean(np.exp(log_variance))))
    write_json(model / "vae" / "config.json", {**VAE_CONFIG, "scaling_factor": round(scale, 5)})
    write_params(model / "vae" / "diffusion_pytorch_model.safetensors", params, dtype=np.float16)
    write_json(workdir / "vae_psnr.json", measure_autoencoder(model / "vae", seed))
    print((workdir / "vae_psnr.json").read_text(encoding="utf-8"))


def _shifted(make_batch: Callable[[int], Any], first_step: int, step: int) -> Any:
    return make_batch(first_step + step)


def measure_autoencoder(folder: Path, seed: int, num_images: int = 1024) -> dict[str, float]:
    """PSNR in dB of the reconstructions, mean over pictures, on backgrounds of the captions and on unseen ones."""
    vae, params = pipelines.read_vae(folder)
    reconstruct = jax.jit(lambda images: jnp.clip(vae.apply({"params": params}, images), -1.0, 1.0))
    generator = _generator(seed, 4)
    concepts = generator.integers(len(world.CONCEPTS), size=num_images)
    colors = generator.integers(len(world.COLOR_NAMES), size=num_images)
    sets = {
        "psnr_seen_backgrounds": pictures.compose(generator, concepts, colors, IMAGE_SIZE),
        "psnr_unseen_backgrounds": pictures.unseen_backgrounds(generator, concepts, IMAGE_SIZE),
    }
    result = {}
    for name, images in sets.items():
        squared = np.square(np.asarray(reconstruct(images)) - images).mean(axis=(1, 2, 3))
        result[name] = round(float(np.mean(10 * np.log10(4 / squared))), 2)
    return result


# ------------------------------------------------------------------------------------------------------------- UNet
def train_unet(workdir: Path, *, seed: int, num_steps: int = 7500) -> None:
    """Noise prediction on the latents of training captions only, min-SNR weighted; completes the pipeline folder."""
    model = workdir / "model"
    vae, vae_params = pipelines.read_vae(model / "vae")
    text_encoder, text_params = pipelines.read_text_encoder(model / "text_encoder")
    tokenizer = tokenizers.read_tokenizer(model / "tokenizer")
    tokens = tokenizers.tokenize(tokenizer, [*world.captions(world.TRAIN_PROMPTS), ""])
    embeddings = text_encoder.apply({"params": text_params}, jnp.asarray(tokens)).last_hidden_state
    embeddings = np.asarray(embeddings)  # the last row is that of the empty caption
    mean, deviation, captions = _encode_bank(vae, vae_params, seed)

    alphas_cumprod = make_schedule(SCHEDULER_CONFIG, 20).alphas_cumprod
    unet = UNet2DConditionModel.from_config(UNET_CONFIG)
    params = _init(unet, seed, jnp.asarray(mean[:1]), jnp.zeros(1), jnp.asarray(embeddings[:1]))

    def make_batch(step: int) -> tuple[Any, Any]:
        generator = _generator(seed, 5, step)
        index = generator.integers(len(mean), size=UNET_BATCH_SIZE)
        noise = generator.standard_normal((UNET_BATCH_SIZE, *mean.shape[1:]), dtype=np.float32)
        dropped = generator.random(UNET_BATCH_SIZE) < CAPTION_DROPOUT
        rows = np.where(dropped, len(embeddings) - 1, captions[index])
        return (mean[index] + deviation[index] * noise) * vae.scaling_factor, embeddings[rows]

    def loss_fn(params, batch, key):
        latents, context = batch
        time_key, noise_key = jax.random.split(key)
        timesteps = jax.random.randint(time_key, (latents.shape[0],), 0, 1000)
        noise = jax.random.normal(noise_key, latents.shape)
        alpha = alphas_cumprod[timesteps][:, None, None, None]
        noisy = jnp.sqrt(alpha) * latents + jnp.sqrt(1 - alpha) * noise
        error = jnp.square(unet.apply({"params": params}, noisy, timesteps, context) - noise).mean(axis=(1, 2, 3))
        snr = (alpha / (1 - alpha)).reshape(-1)
        return (jnp.minimum(snr, MIN_SNR_GAMMA) / snr * error).mean(), {"mse": error.mean()}

    params = fit(
        "unet", params, loss_fn, make_batch, num_steps=num_steps, learning_rate=1e-3, workdir=workdir, seed=seed
    )
    write_json(model / "unet" / "config.json", UNET_CONFIG)
    write_params(model / "unet" / "diffusion_pytorch_model.safetensors", params, dtype=np.float16)
    write_json(model / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    write_json(model / "model_index.json", MODEL_INDEX)


def _encode_bank(vae: AutoencoderKL, params: Any, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posterior means and deviations of random training pictures, and the caption index of each."""
    encode = jax.jit(lambda images: vae.apply({"params": params}, images, method=vae.encode))
    means, deviations, captions = [], [], []
    for i in range(LATENT_BANK // 512):
        images, index = pictures.training_batch(_generator(seed, 6, i), 512, world.TRAIN_PROMPTS, IMAGE_SIZE)
        mean, log_variance = encode(images)
        means.append(np.asarray(mean))
        deviations.append(np.exp(0.5 * np.asarray(log_variance)))
        captions.append(index)
    return np.concatenate(means), np.concatenate(deviations), np.concatenate(captions)
