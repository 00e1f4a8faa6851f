"""Whether ours and the PyTorch program compute the same numbers from the same weights and noise.

The networks alone; then the pool of a batch with its scores, and the loss and gradient of each update, which follow
from everything before them. Each program runs in a process of its own, which writes its numbers into a file:

    python -m benchmarks.check ours TURN FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Turn, turn_of
from benchmarks.models import SIZES, part_shapes
from spo_jax import rng
from spo_jax.diffusion.pool import draw_pool_noise
from spo_jax.formats.lora import starting_lora
from spo_jax.formats.names import torch_key
from spo_jax.preference.pairs import compact

if TYPE_CHECKING:  # our side runs without it
    import torch

Numbers = dict[str, np.ndarray]
# For float32, see ``differences``. Adam divides a gradient by its own size: after a step rounding counts for more.
TOLERANCE, LATER_TOLERANCE = 1e-3, 2e-2
LATER = "loss and gradient of later updates"
SEED = 0


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


def ours(turn: Turn) -> Numbers:
    """By our programs; the pool and the updates are those that training runs."""
    from benchmarks.our_iteration import load, nhwc
    from spo_jax.runs.held_out import encode_texts
    from spo_jax.sampling.encode import shard_prompts
    from spo_jax.sampling.generate import make_decode
    from spo_jax.spo.rollout import Rollout
    from spo_jax.spo.steps import run_updates

    work = turn.work
    spo = load(work, Path(turn.folder), turn.dtype)
    height, width, channels = spo.pipeline.latent_shape
    given = inputs((channels, height, width), work.pixels)
    prompts = shard_prompts(encode_texts(spo, work.texts), spo.mesh)
    context, text = (jnp.repeat(x[:1], 2, axis=0) for x in (prompts.embeddings, prompts.scorer_text))
    latents, x0, images = (jnp.asarray(nhwc(given[name])) for name in ("latents", "x0", "images"))
    output = jax.jit(spo.pipeline.unet.apply)({"params": spo.params["unet"]}, latents, given["timesteps"], context)
    decoded = jax.jit(make_decode(spo.pipeline))(spo.params, x0)
    scores = jax.jit(spo.scorer.of_images.score)(spo.params["scorer"], images, text, given["timesteps"])

    key = jax.random.key(SEED)
    pool = spo.programs["pool"](spo.pool_params, spo.state.trained, prompts, key)
    pairs, pool_scores = spo.programs["score"](spo.score_params, pool, prompts.scorer_text, key)
    rollout = Rollout(pairs, *spo.programs["arrange"](key, pairs.valid, pool_scores))
    _, updates = run_updates(spo, spo.state, prompts, rollout, int(rollout.num_valid))
    return {
        "text embeddings": np.float32(jnp.concatenate([prompts.embeddings, prompts.negative_embeddings])),
        "UNet": _nchw(output),
        "decoder": _nchw(decoded),
        "scores of images": np.float32(scores),
        "scores of a pool": np.float32(pool_scores),
        **_of_updates([(u.sums.loss / u.num_pairs, u.grad_norm) for u in updates]),
    }


def wrong(found: dict[str, float]) -> list[str]:
    """Which of ``differences`` are too large for float32."""
    return [name for name, x in found.items() if not x <= (LATER_TOLERANCE if name == LATER else TOLERANCE)]


def _of_updates(told: list[tuple[float, float]]) -> Numbers:
    """Loss and norm of the gradient of the first update, and of the others, each as part of the first one's."""
    numbers = np.array(told, np.float64)
    return {"gradient of the first update": numbers[0, 1:], LATER: numbers[1:] / numbers[0]}


def _nchw(x: jax.Array) -> np.ndarray:
    return np.moveaxis(np.float32(x), -1, -3)


def theirs(turn: Turn) -> Numbers:
    """By the PyTorch program, with the noise, the order of pairs and the first adapters of ours."""
    import torch

    from benchmarks import pytorch_iteration as program

    work, device = turn.work, program.prepare(turn.device, exact=True)
    loaded = program.load(work, Path(turn.folder), device, getattr(torch, turn.dtype))
    _use_our_adapters(loaded.unet, turn)
    channels, height, width = loaded.latent_shape
    given = {name: torch.from_numpy(x).to(device) for name, x in inputs(loaded.latent_shape, work.pixels).items()}
    texts = program.encode(loaded, work.texts)
    with torch.no_grad():
        context = texts.positive[:1].expand(2, -1, -1)
        output = loaded.unet(given["latents"].to(loaded.unet.dtype), given["timesteps"], context).sample
        decoded = program.decode(loaded, given["x0"])
        images = program.image_features(loaded.scorer, given["images"], given["timesteps"])
        scores = loaded.scorer.logit_scale.float().exp() * (images * texts.features[:1]).sum(-1)

    key = jax.random.key(SEED)
    noise = draw_pool_noise(
        rng.stream(key, "pool"),
        len(work.texts),
        (height, width, channels),
        num_steps=work.steps,
        num_plain_steps=work.plain_steps,
        num_candidates=work.candidates,
    )
    draws = iter([noise.initial, *noise.plain, *noise.candidates])
    picks = iter(np.array(noise.choices))
    pairs, pool_scores = program.sample(
        loaded,
        texts,
        lambda _shape: torch.from_numpy(_nchw(next(draws)).copy()).to(device),
        lambda _count, _below: torch.from_numpy(next(picks)).to(device).long(),
    )
    order, _ = compact(rng.stream(key, "shuffle"), jnp.ones(work.pairs, bool))
    updates = program.update(loaded, texts, pairs, torch.from_numpy(np.array(order)).long().to(device))
    found = {
        "text embeddings": torch.cat([texts.positive, texts.negative]),
        "UNet": output,
        "decoder": decoded,
        "scores of images": scores,
        "scores of a pool": pool_scores,
    }
    numbers = {name: value.float().cpu().numpy() for name, value in found.items()}
    return numbers | _of_updates([(u["loss"], u["grad_norm"]) for u in updates])


def _use_our_adapters(unet: torch.nn.Module, turn: Turn) -> None:
    """Puts the adapters that our run starts from into peft's places."""
    import flax.traverse_util
    import torch

    key = rng.stream(jax.random.key(0), "lora")
    adapters = starting_lora(key, part_shapes("unet", SIZES[turn.size].networks["unet"]), turn.work.rank, None)
    modules = dict(unet.named_modules())
    for path, value in flax.traverse_util.flatten_dict(adapters).items():
        module = modules[torch_key((*path[:-1], "")).removesuffix(".")]
        place = getattr(module, f"lora_{path[-1]}")["default"].weight
        place.data.copy_(torch.from_numpy(np.array(value).T))


if __name__ == "__main__":
    _, side, given, file = sys.argv
    np.savez(file, **{"ours": ours, "pytorch": theirs}[side](turn_of(given)))
