"""Whether ours and the PyTorch program compute the same numbers from the same weights and noise.

The networks alone; then the pool of a batch with its scores, and the loss and gradient of each update, which follow
from everything before them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import PROMPTS, Size, part_shapes
from spo_jax import rng
from spo_jax.diffusion.pool import draw_pool_noise
from spo_jax.formats.lora import starting_lora
from spo_jax.formats.names import torch_key
from spo_jax.preference.pairs import compact

if TYPE_CHECKING:  # our side runs without it
    import torch

Numbers = dict[str, np.ndarray]
TOLERANCE = 1e-3  # for float32, see ``differences``
SEED = 0


def write(path: str, numbers: Numbers) -> None:
    """For ``differences``."""
    np.savez(path, **numbers)


def differences(first: str, second: str) -> dict[str, float]:
    """The largest difference of each array of two files, as part of its largest value."""
    a, b = np.load(first), np.load(second)
    assert set(a) == set(b)
    return {name: float(np.abs(a[name] - b[name]).max() / np.abs(a[name]).max()) for name in a}


def inputs(latent_shape: tuple[int, int, int], pixels: int) -> Numbers:
    """Two of each: latents and x0 [2, c, h, w], images [2, 3, H, W] in [-1, 1], timesteps."""
    generator = np.random.default_rng(SEED)
    latents, x0 = generator.standard_normal((2, 2, *latent_shape), np.float32)
    images = generator.uniform(-1, 1, (2, 3, pixels, pixels)).astype(np.float32)
    return {"latents": latents, "x0": x0, "images": images, "timesteps": np.array([801, 21])}


def ours(size: Size, folder: Path, _device: str, dtype: str) -> Numbers:
    """By our programs; the pool and the updates are those that training runs."""
    from benchmarks.our_iteration import load, nhwc
    from spo_jax.sampling.encode import shard_prompts
    from spo_jax.sampling.generate import make_decode
    from spo_jax.spo.rollout import Rollout
    from spo_jax.spo.steps import encode_texts, run_updates

    spo = load(size, folder, dtype)
    height, width, channels = spo.pipeline.latent_shape
    given = inputs((channels, height, width), size.pixels)
    prompts = shard_prompts(encode_texts(spo, PROMPTS[: size.prompts]), spo.mesh)
    context, text = (jnp.repeat(x[:1], 2, axis=0) for x in (prompts.embeddings, prompts.scorer_text))
    latents, x0, images = (jnp.asarray(nhwc(given[name])) for name in ("latents", "x0", "images"))
    output = jax.jit(spo.pipeline.unet.apply)({"params": spo.params["unet"]}, latents, given["timesteps"], context)
    decoded = jax.jit(make_decode(spo.pipeline))(spo.params, x0)
    scores = jax.jit(spo.scorer.of_images.score)(spo.params["scorer"], images, text, given["timesteps"])

    key = jax.random.key(SEED)
    pairs, pool_scores = spo.programs["pool"](spo.pool_params, spo.state.trained, prompts, key)
    rollout = Rollout(pairs, *spo.programs["arrange"](key, pairs.valid, pool_scores))
    _, updates = run_updates(spo, spo.state, prompts, rollout, int(rollout.num_valid))
    return {
        "text embeddings": np.float32(jnp.concatenate([prompts.embeddings, prompts.negative_embeddings])),
        "UNet": _nchw(output),
        "decoder": _nchw(decoded),
        "scores of images": np.float32(scores),
        "scores of a pool": np.float32(pool_scores),
        "losses of updates": np.array([u.sums.loss / u.num_pairs for u in updates]),
        "norms of gradients": np.array([u.grad_norm for u in updates]),
    }


def _nchw(x: jax.Array) -> np.ndarray:
    return np.moveaxis(np.float32(x), -1, -3)


def theirs(size: Size, folder: Path, device: str, dtype: str) -> Numbers:
    """By the PyTorch program, with the noise, the order of pairs and the first adapters of ours."""
    import torch

    from benchmarks import pytorch_iteration as program

    device = program.prepare(device, exact=True)
    loaded = program.load(size, folder, device, getattr(torch, dtype))
    _use_our_adapters(loaded.unet, size)
    channels, height, width = loaded.latent_shape
    given = {name: torch.from_numpy(x).to(device) for name, x in inputs(loaded.latent_shape, size.pixels).items()}
    texts = program.encode(loaded, list(PROMPTS[: size.prompts]))
    with torch.no_grad():
        context = texts.positive[:1].expand(2, -1, -1)
        output = loaded.unet(given["latents"].to(loaded.unet.dtype), given["timesteps"], context).sample
        decoded = program.decode(loaded, given["x0"])
        images = program.torch_image_features(loaded.scorer, given["images"], given["timesteps"])
        scores = loaded.scorer.logit_scale.float().exp() * (images * texts.features[:1]).sum(-1)

    key = jax.random.key(SEED)
    noise = draw_pool_noise(
        rng.stream(key, "pool"),
        size.prompts,
        (height, width, channels),
        num_steps=size.steps,
        num_plain_steps=size.plain_steps,
        num_candidates=size.candidates,
    )
    draws = iter([noise.initial, *noise.plain, *noise.candidates])
    picks = iter(np.array(noise.choices))
    pairs, pool_scores = program.sample(
        loaded,
        texts,
        lambda _shape: torch.from_numpy(_nchw(next(draws)).copy()).to(device),
        lambda _count, _below: torch.from_numpy(next(picks)).to(device).long(),
    )
    order, _ = compact(rng.stream(key, "shuffle"), jnp.ones(size.pairs, bool))
    updates = program.update(loaded, texts, pairs, torch.from_numpy(np.array(order)).long().to(device))
    found = {
        "text embeddings": torch.cat([texts.positive, texts.negative]),
        "UNet": output,
        "decoder": decoded,
        "scores of images": scores,
        "scores of a pool": pool_scores,
    }
    return {name: value.float().cpu().numpy() for name, value in found.items()} | {
        "losses of updates": np.array([u["loss"] for u in updates]),
        "norms of gradients": np.array([u["grad_norm"] for u in updates]),
    }


def _use_our_adapters(unet: torch.nn.Module, size: Size) -> None:
    """Puts the adapters that our run starts from into peft's places."""
    import flax.traverse_util
    import torch

    key = rng.stream(jax.random.key(0), "lora")
    adapters = starting_lora(key, part_shapes("unet", size.networks["unet"]), size.rank, None)
    modules = dict(unet.named_modules())
    for path, value in flax.traverse_util.flatten_dict(adapters).items():
        module = modules[torch_key((*path[:-1], "")).removesuffix(".")]
        place = getattr(module, f"lora_{path[-1]}")["default"].weight
        place.data.copy_(torch.from_numpy(np.array(value).T))
