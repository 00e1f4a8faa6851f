"""Images of several models for the same prompts and the same noise, as PNG files in a folder; resumable.

    OUT/images/MODEL/00012_3.png      prompt 12, seed 3

A batch of rows is always the same one, and is made again whole if a file of it is missing: so a run that was
interrupted writes the files that it would have written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree
from PIL import Image

from spo_jax import rng
from spo_jax.diffusion.dpm_solver import make_dpm_schedule
from spo_jax.diffusion.schedule import Schedule, make_schedule
from spo_jax.distributed.mesh import batch_sharding, jit_on, make_mesh, replicated, round_up
from spo_jax.errors import UserError, notice
from spo_jax.evaluation.layouts import image_path
from spo_jax.formats.base import Base, read_base
from spo_jax.formats.lora import read_adapters
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import cut_warning, tokenizers_of
from spo_jax.images import to_uint8, write_png
from spo_jax.sampling.encode import encode_prompts, make_encode, shard_prompts
from spo_jax.sampling.generate import SamplingOptions, make_generate

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PIXELS = 2**26  # of an image that is read


class Rows(NamedTuple):
    """What is made for each model: prompts, and how many images of each."""

    prompts: list[str]
    num_seeds: int

    @property
    def places(self) -> list[tuple[int, int]]:
        """(number of the prompt, number of the seed) of each image, prompts first."""
        return [(prompt, seed) for prompt in range(len(self.prompts)) for seed in range(self.num_seeds)]


# ``(prompt numbers, seed numbers) -> images [B, H, W, 3]`` of one model.
SampleRows = Callable[[Sequence[int], Sequence[int]], np.ndarray]


class Sampling(NamedTuple):
    """How a command's flags want images: ``size`` is (height, width), None for what the model was trained for."""

    solver: str
    num_steps: int
    guidance_scale: float
    eta: float
    size: tuple[int | None, int | None]
    dtype: str
    seed: int


def open_sampler(base: Base, loras: Sequence[str], rows: Rows, sampling: Sampling) -> tuple[SampleRows, int]:
    """Reads a model with adapters; its sampler, and how many devices split a batch.

    Raises:
      UserError: the model or its adapters cannot be read or do not fit.
    """
    mesh = make_mesh(-1, 1)
    height, width = sampling.size
    pipeline = read_base(base, jnp.dtype(sampling.dtype), sharding=replicated(mesh), height=height, width=width)
    if warning := cut_warning(tokenizers_of(pipeline), rows.prompts, "prompts"):
        notice(warning)
    lora = jax.device_put(read_adapters(loras, pipeline.params), replicated(mesh))
    make = make_dpm_schedule if sampling.solver == "dpmpp_2m" else make_schedule
    schedule = make(pipeline.scheduler_config, sampling.num_steps)
    options = SamplingOptions(sampling.guidance_scale, sampling.eta, sampling.solver)
    return make_sampler(pipeline, lora, schedule, options, rows, sampling.seed, mesh), mesh.size


def make_sampler(
    pipeline: Pipeline,
    lora: dict[str, PyTree],
    schedule: Schedule,
    options: SamplingOptions,
    rows: Rows,
    seed: int,
    mesh: Mesh,
) -> SampleRows:
    """Samples images of a model; the noise is that of prompt, seed number and ``seed``, whatever the model.

    Args:
      pipeline: on all devices of the mesh.
      lora: adapters by part, empty for a base model.
      schedule: of the solver that ``options`` name.
      options: of sampling.
      rows: prompts and seeds; the numbers count in these.
      seed: root of the noise.
      mesh: the devices, which split each batch.
    """
    encode = jax.jit(make_encode(pipeline))
    generate = make_generate(pipeline, schedule, options)
    variables = {"params": pipeline.params["unet"]} | ({"lora": lora["unet"]} if "unet" in lora else {})
    params = {**pipeline.params, "lora": lora}
    root, shape = rng.stream(jax.random.key(seed), "evaluate"), pipeline.latent_shape

    def sample(params: PyTree, variables: PyTree, prompts: PyTree, ids: jax.Array, seeds: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(root, i), s))(ids, seeds)
        initial = jax.vmap(lambda key: jax.random.normal(rng.stream(key, "initial"), shape))(keys)
        noise = None
        if options.eta > 0:
            steps = (schedule.num_steps, *shape)
            noise = jax.vmap(lambda key: jax.random.normal(rng.stream(key, "steps"), steps), out_axes=1)(keys)
        return generate(params, variables, prompts, initial, noise)

    program = jit_on(mesh, sample, out_shardings=replicated(mesh))

    def sample_rows(ids: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        texts = [rows.prompts[i] for i in ids]
        prompts = shard_prompts(encode_prompts(encode, params, pipeline, None, texts), mesh)
        numbers = (jax.device_put(jnp.array(x, jnp.int32), batch_sharding(mesh)) for x in (ids, seeds))
        return np.asarray(program(pipeline.params, variables, prompts, *numbers))

    return sample_rows


def batches(rows: Rows, batch_size: int, mesh_size: int) -> Iterator[list[tuple[int, int]]]:
    """The rows in batches that the devices can split; the last one is filled up from the start."""
    places, size = rows.places, round_up(batch_size, mesh_size)
    for start in range(0, len(places), size):
        yield [places[i % len(places)] for i in range(start, start + size)]


def sample_pictures(
    sample: SampleRows, model: str, rows: Rows, out: Path, batch_size: int, mesh_size: int
) -> Iterator[int]:
    """Writes the images of a model that are missing; yields after each batch how many rows it has.

    Raises:
      UserError: an image has numbers that are not finite.
    """
    left = len(rows.places)
    for batch in batches(rows, batch_size, mesh_size):
        new = batch[:left]
        left -= len(new)
        if not all(image_path(out, model, *place).is_file() for place in new):
            images = sample(*zip(*batch, strict=True))[: len(new)]
            for place, image in zip(new, images, strict=True):
                if not np.isfinite(image).all():
                    raise UserError(
                        f"The image of {rows.prompts[place[0]]!r} by {model} has numbers that are not finite; its "
                        "weights are damaged, or its adapters or --guidance_scale are too strong."
                    )
                write_png(image_path(out, model, *place), to_uint8(image))
        yield len(new)


def read_picture(path: Path) -> np.ndarray:
    """An image as uint8 [H, W, 3]; UserError if it is missing, damaged or too large."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"Image {path} has {image.width}x{image.height} pixels, more than {MAX_PIXELS}.")
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise UserError(f"Image {path} is missing; run the same command again, it makes what is not there.") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"Image {path} is damaged ({error}); delete it and make it again.") from error


def given_pictures(folder: Path, rows: Rows) -> list[Path]:
    """The images of a folder in the order of their names, numbers by their value, one for each row.

    Raises:
      UserError: there is no such folder, or it has another number of images.
    """
    if not folder.is_dir():
        raise UserError(f"--images={folder} is no folder; give one with an image for each prompt.")
    found = sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES), key=_natural)
    if len(found) != (count := len(rows.places)):
        raise UserError(
            f"--images={folder} has {len(found)} images, and {len(rows.prompts)} prompts with "
            f"{rows.num_seeds} of each need {count}, in the order of their names: first those of the first prompt."
        )
    return found


def take_pictures(paths: Sequence[Path], model: str, rows: Rows, out: Path) -> None:
    """Copies given images to where ``image_path`` says, as PNG; UserError if one is damaged."""
    for path, place in zip(paths, rows.places, strict=True):
        target = image_path(out, model, *place)
        if not target.is_file():
            write_png(target, read_picture(path))


def _natural(path: Path) -> list[tuple[int, str]]:
    """ "a10" after "a9"."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
