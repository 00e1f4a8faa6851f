"""Pairs of pictures with simulated human preferences: what ``configs/spm_tiny.py`` learns from.

    python -m spo_jax.emoji.pairs --out=runs/emoji_pairs

The shipped base model draws several pictures of each caption, and simulated people prefer the more colourful one of two
(Hasler and Suesstrunk 2003), with the noise of the Bradley-Terry model: ``P(a preferred) =
sigmoid((colourfulness(a) - colourfulness(b)) / TEMPERATURE)``. A pair of ``train`` has the votes of eight people as its
label, one of ``validation`` and ``test`` the choice of one. Each split is a JSONL file beside its pictures, as a user's
own pairs would be; ``python -m spo_jax.prepare`` reads it. Captions of ``test`` are those that neither the base model
nor SPO has seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from absl import flags

from spo_jax import cli
from spo_jax.emoji import world
from spo_jax.errors import UserError

if TYPE_CHECKING:
    import jax

TEMPERATURE = 10.0  # of the Bradley-Terry noise, in units of colourfulness
SAMPLING_STEPS = 10
GUIDANCE_SCALE = 2.0
NUM_VALIDATION_CAPTIONS = 160
CAPTIONS_PER_BATCH = 20

SEED = cli.seed_flag("Seed of pictures and labels.")
OUT = flags.DEFINE_string("out", None, "A new folder.")


class Split(NamedTuple):
    """Captions, pictures of each, whether every two of them make a pair or each is in one only, votes on a pair."""

    captions: list[str]
    pictures: int
    all_pairs: bool
    votes: int


def splits(seed: int) -> dict[str, Split]:
    """Validation captions are some of the base model's. Pairs that only measure share no picture."""
    captions = world.captions(world.TRAIN_PROMPTS)
    order = np.random.default_rng([seed, 7]).permutation(len(captions))
    validation, training = order[:NUM_VALIDATION_CAPTIONS], order[NUM_VALIDATION_CAPTIONS:]
    return {
        "train": Split([captions[i] for i in training], 4, all_pairs=True, votes=8),
        "validation": Split([captions[i] for i in validation], 4, all_pairs=False, votes=1),
        "test": Split(world.captions(world.HELD_OUT_PROMPTS), 12, all_pairs=False, votes=1),
    }


def main() -> None:
    """Samples the pictures, draws the labels and writes both."""
    if not OUT.value:
        raise UserError("--out is missing; for example --out=runs/emoji_pairs.")
    out = Path(OUT.value)
    if out.exists():
        raise UserError(f"--out={out} is there already; choose a new folder, or delete it.")
    import jax
    from tqdm import tqdm

    from spo_jax import rng
    from spo_jax.images import write_png

    sample = make_sampler()
    root = rng.stream(jax.random.key(SEED.value), "pairs")
    every = splits(SEED.value)
    total = sum(len(split.captions) * split.pictures for split in every.values())
    ceilings = {}
    with tqdm(total=total, desc="pictures", dynamic_ncols=True) as progress:
        for name, split in every.items():
            generator = np.random.default_rng([SEED.value, *name.encode()])
            apart = np.arange(split.pictures).reshape(-1, 2).T
            first, second = np.triu_indices(split.pictures, 1) if split.all_pairs else apart
            lines, agreements = [], []
            for start in range(0, len(split.captions), CAPTIONS_PER_BATCH):
                captions = split.captions[start : start + CAPTIONS_PER_BATCH]
                images, colors = sample(captions, split.pictures, rng.stream(rng.stream(root, name), "batch", start))
                difference = colors[:, first] - colors[:, second]
                labels = generator.binomial(split.votes, 1 / (1 + np.exp(-difference / TEMPERATURE))) / split.votes
                agreements.append(((difference > 0) == (labels > 0.5))[labels != 0.5])
                for row, caption in enumerate(captions):
                    files = [f"{name}/{start + row:04d}_{i:02d}.png" for i in range(split.pictures)]
                    for file, image in zip(files, images[row], strict=True):
                        write_png(out / file, image)
                    for a, b, label in zip(first, second, labels[row], strict=True):
                        line = {"caption": caption, "image_a": files[a], "image_b": files[b], "label": float(label)}
                        lines.append(json.dumps(line))
                progress.update(len(captions) * split.pictures)
            (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            ceilings[name] = {"pairs": len(lines), "ceiling": float(np.concatenate(agreements).mean())}
    # The most that a judge can reach, up to chance: agreement of the true preference with its own noisy labels.
    (out / "ceiling.json").write_text(json.dumps(ceilings, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(ceilings))


def make_sampler() -> Callable[[list[str], int, jax.Array], tuple[np.ndarray, np.ndarray]]:
    """``sample(captions, count, key) -> (uint8 [n, count, H, W, 3], colourfulness [n, count])`` by the base model."""
    import jax
    import jax.numpy as jnp

    from spo_jax.diffusion.schedule import make_schedule
    from spo_jax.evaluation.metrics import colorfulness
    from spo_jax.formats.pipeline import read_pipeline
    from spo_jax.images import to_uint8
    from spo_jax.sampling.encode import encode_prompts, make_encode
    from spo_jax.sampling.generate import SamplingOptions, make_generate

    pipeline = read_pipeline("emoji:model")
    schedule = make_schedule(pipeline.scheduler_config, SAMPLING_STEPS)
    generate = jax.jit(make_generate(pipeline, schedule, SamplingOptions(GUIDANCE_SCALE)))
    encode = jax.jit(make_encode(pipeline))

    def sample(captions: list[str], count: int, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        prompts = encode_prompts(encode, pipeline.params, pipeline, None, captions)
        prompts = prompts.map_rows(lambda rows: jnp.repeat(rows, count, axis=0))
        initial = jax.random.normal(key, (len(captions) * count, *pipeline.latent_shape))
        images = to_uint8(generate(pipeline.params, {"params": pipeline.params["unet"]}, prompts, initial))
        colors = np.asarray(colorfulness(jnp.asarray(images / 127.5 - 1.0)))
        return images.reshape(len(captions), count, *images.shape[1:]), colors.reshape(len(captions), count)

    return sample


if __name__ == "__main__":
    cli.run(main)
