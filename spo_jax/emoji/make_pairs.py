"""Makes pairs of pictures with simulated human preferences; what they are, and the command: ``pairs.py``."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spo_jax import methods
from spo_jax.emoji import world
from spo_jax.errors import notice

if TYPE_CHECKING:
    import jax
    from ml_collections import ConfigDict

TEMPERATURE = 10.0  # of the Bradley-Terry noise, in units of colourfulness
SAMPLING_STEPS = 10
GUIDANCE_SCALE = 2.0
NUM_VALIDATION_CAPTIONS = 160
CAPTIONS_PER_BATCH = 20
BATCHES_AT_ONCE = 2  # of so small a model: one alone leaves a second core half idle
CEILING = "ceiling.json"
PREPARED_SEED = 0  # the shipped preference model was trained on its pairs
PREPARED_SPLITS = ("train", "validation")  # what training reads; "test" is a third of all pictures, which take minutes


class Split(NamedTuple):
    """Captions, pictures of each, whether every two of them make a pair or each is in one only, votes on a pair."""

    captions: list[str]
    pictures: int
    all_pairs: bool
    votes: int


def splits(seed: int, num_captions: int | None = None) -> dict[str, Split]:
    """The splits by name; of each only the first ``num_captions`` captions if that is given.

    Validation captions are some of the base model's. Pairs that only measure share no picture.
    """
    captions = world.captions(world.TRAIN_PROMPTS)
    order = np.random.default_rng([seed, 7]).permutation(len(captions))
    validation, training = order[:NUM_VALIDATION_CAPTIONS], order[NUM_VALIDATION_CAPTIONS:]
    every = {
        "train": Split([captions[i] for i in training], 4, all_pairs=True, votes=8),
        "validation": Split([captions[i] for i in validation], 4, all_pairs=False, votes=1),
        "test": Split(world.captions(world.HELD_OUT_PROMPTS), 12, all_pairs=False, votes=1),
    }
    return {name: split._replace(captions=split.captions[:num_captions]) for name, split in every.items()}


def write_pairs(out: Path, seed: int, every: Mapping[str, Split], *, show: bool = True) -> dict[str, dict[str, float]]:
    """Samples the pictures of some splits, draws the labels and writes both to the folder ``out``.

    Args:
      out: gets ``SPLIT.jsonl`` and the folder ``SPLIT`` of each split, and ``CEILING``.
      seed: of pictures and labels.
      every: as ``splits(seed)`` gives them.
      show: a progress bar.

    Returns:
      What ``CEILING`` holds: of each split the number of pairs, and the most that a judge can reach, up to chance,
      which is the agreement of the true preference with its own noisy labels.
    """
    import jax
    from tqdm import tqdm

    from spo_jax import rng
    from spo_jax.images import write_png

    sample = make_sampler()
    root = rng.stream(jax.random.key(seed), "pairs")
    total = sum(len(split.captions) * split.pictures for split in every.values())
    ceilings = {}
    bar = tqdm(total=total, desc="pictures", dynamic_ncols=True, disable=not show)
    with bar as progress, contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(BATCHES_AT_ONCE)
        stack.callback(pool.shutdown, cancel_futures=True)  # an interruption does not wait for all that was asked for
        for name, split in every.items():
            generator = np.random.default_rng([seed, *name.encode()])
            apart = np.arange(split.pictures).reshape(-1, 2).T
            first, second = np.triu_indices(split.pictures, 1) if split.all_pairs else apart
            lines, agreements = [], []

            def draw(start: int, name: str = name, split: Split = split) -> tuple[list[str], np.ndarray, np.ndarray]:
                captions = split.captions[start : start + CAPTIONS_PER_BATCH]
                return captions, *sample(captions, split.pictures, rng.stream(rng.stream(root, name), "batch", start))

            starts = range(0, len(split.captions), CAPTIONS_PER_BATCH)
            for start, (captions, images, colors) in zip(starts, pool.map(draw, starts), strict=True):
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
    (out / CEILING).write_text(json.dumps(ceilings, indent=2) + "\n", encoding="utf-8")
    return ceilings


def make_prepared(num_captions: int | None = None, *, show: bool = True) -> Path:
    """The folder that ``emoji:pairs`` stands for; makes it if it is not there, with ``PREPARED_SPLITS``.

    It appears at once and whole. Processes that share a disk may all call this: one makes the folder, the others wait.

    Args:
      num_captions: of each split, the first so many; all by default.
      show: a progress bar, and a sentence that says where the folder is.

    Raises:
      UserError: there is no place for it, or it cannot be written.
    """
    from spo_jax.data.builder import INFO, write_split
    from spo_jax.data.places import EMOJI_PAIRS, pairs_folder
    from spo_jax.data.sources import open_source
    from spo_jax.files import saying_where
    from spo_jax.formats.transfer import alone

    folder = pairs_folder(EMOJI_PAIRS)
    if (folder / INFO).is_file():
        return folder
    with saying_where(folder, "HF_HOME"), alone(folder.with_name(f"{folder.name}.lock"), EMOJI_PAIRS):
        if (folder / INFO).is_file():
            return folder
        if show:
            notice(f"the pairs of the emoji world are made once, in minutes, and kept in {folder}.")
        every = splits(PREPARED_SEED, num_captions)
        every = {name: every[name] for name in PREPARED_SPLITS}
        # One of its own for each machine: a disk that several share may have no locks.
        scratch = folder.with_name(f".{folder.name}.{platform.node()}")
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        try:
            write_pairs(scratch / "source", PREPARED_SEED, every, show=show)
            for name in every:
                write_split(scratch / "made", name, open_source(str(scratch / "source" / f"{name}.jsonl")).read())
            shutil.copy(scratch / "source" / CEILING, scratch / "made" / CEILING)
            try:
                os.replace(scratch / "made", folder)
            except OSError:
                if not (folder / INFO).is_file():  # else another machine was faster
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def make_for(config: ConfigDict) -> None:
    """Makes what ``emoji:pairs`` stands for if a config's data name it; all processes of a run call this together.

    Raises:
      UserError: the config is wrong, which is found first, or the pairs cannot be written.
    """
    from spo_jax.data.places import EMOJI_PAIRS

    names = (config.data.get("train"), config.data.get("validation")) if "data" in config else ()
    if not any(name and name.rpartition("@")[0] == EMOJI_PAIRS for name in names):
        return

    from spo_jax.distributed.agreement import everyone
    from spo_jax.distributed.mesh import make_mesh
    from spo_jax.distributed.processes import is_main_process

    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    methods.check(config, mesh.size)

    def act() -> None:
        make_prepared(show=is_main_process())

    everyone(act)  # on one disk the first one makes them, on disks of their own each process does


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
