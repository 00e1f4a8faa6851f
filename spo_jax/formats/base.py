"""The base model of a command: what its flags name, or what the run recorded whose adapters are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from spo_jax.errors import UserError
from spo_jax.formats.hub import local, with_strength
from spo_jax.formats.json_files import read_json
from spo_jax.formats.pipeline import Pipeline, read_pipeline, with_image_size
from spo_jax.formats.weights import Placement


class Base(NamedTuple):
    """A pipeline, the variant of its weight files, and what replaces its UNet and autoencoder; "" for none of these."""

    model: str
    variant: str = ""
    unet: str = ""
    vae: str = ""


def base_of_config(config: Mapping[str, object]) -> Base:
    """What a config of training names; a config from before a key was added does without it."""
    return Base(*(str(config.get(field) or "") for field in Base._fields))


def base_of(
    loras: Iterable[str],
    *,
    model: str | None,
    variant: str | None,
    unet: str | None,
    vae: str | None,
    default: str | None = None,
) -> Base:
    """What the flags of a command name; without --model, what the workdirs among ``loras``, adapters, have recorded.

    A flag that was not given is None; the others count more than what is recorded. ``default`` is the model if there is
    neither a flag nor a workdir. UserError if two workdirs have different models, or none has one and there is no
    default.
    """
    base = Base(model) if model else _recorded(list(loras), default)
    given = {"variant": variant, "unet": unet, "vae": vae}
    return base._replace(**{name: value for name, value in given.items() if value is not None})


def _recorded(loras: list[str], default: str | None) -> Base:
    bases: dict[Path, Base] = {}
    for lora in loras:
        file = local(with_strength(lora)[0]) / "config.json"
        config = read_json(file) if file.is_file() else {}
        if isinstance(config.get("model"), str):
            bases[file] = base_of_config(config)
        elif file.is_file() and default is None:
            raise UserError(f"File {file} names no model; give it as --model.")
    if len(set(bases.values())) > 1:
        raise UserError(f"--model is missing, and {' and '.join(map(str, bases))} name different ones.")
    if bases:
        return next(iter(bases.values()))
    if default is None:
        raise UserError(
            f"--model is missing, and {' and '.join(loras)} is no --workdir of training that would name it."
        )
    return Base(default)


def read_base(
    base: Base,
    dtype: DTypeLike = jnp.float32,
    *,
    height: int | None = None,
    width: int | None = None,
    sharding: Placement = None,
) -> Pipeline:
    """The pipeline of a base model for images of a size, see ``read_pipeline`` and ``with_image_size``."""
    parts = {"variant": base.variant or None, "unet": base.unet or None, "vae": base.vae or None}
    pipeline = read_pipeline(base.model, dtype, sharding=sharding, **parts)
    return with_image_size(pipeline, height, width)
