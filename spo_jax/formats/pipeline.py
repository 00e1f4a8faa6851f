"""A diffusers pipeline folder: ``model_index.json``, unet, vae, text_encoder, tokenizer, scheduler.

SDXL has ``text_encoder_2`` and ``tokenizer_2`` as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from spo_jax.errors import UserError, notice
from spo_jax.formats.hub import missing, resolve_model
from spo_jax.formats.parts import check_parts, check_vae, mended_unet, scheduler_of
from spo_jax.formats.safetensors_io import param_shapes
from spo_jax.formats.tokenizers import check_lengths, read_tokenizer
from spo_jax.formats.weights import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    Placement,
    choose_variant,
    find_weights,
    open_file,
    open_weights,
    read_params,
    say_variant,
)
from spo_jax.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
)
from spo_jax.models.clip import is_time_layer, with_identity_time_layers
from spo_jax.models.published import CLIP_VIT_H
from spo_jax.types import AddedConditions

_MAX_JSON_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The parts of a text-to-image pipeline.

    ``params`` holds a tree for each of ``"unet"``, ``"vae"``, ``"text_encoder"`` and, for SDXL, ``"text_encoder_2"``;
    ``scheduler_config`` is the parsed ``scheduler/scheduler_config.json`` and ``tokenizer`` a transformers tokenizer.
    ``force_zeros_for_empty_prompt`` means that an empty negative prompt stands for zeros instead of its embeddings.
    ``latent_size`` [h, w] is there for pictures of another size than the UNet was trained for. ``replaced`` holds the
    folders of parts that are not those in ``folder``, and ``variant`` is that of the weight files that was asked for.
    """

    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Any
    scheduler_config: dict[str, Any]
    params: dict[str, Any]
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: Any = None
    force_zeros_for_empty_prompt: bool = False
    latent_size: tuple[int, int] | None = None
    replaced: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    variant: str | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of the latents, at the resolution the UNet was trained for unless ``latent_size`` says another."""
        size = self.latent_size or self.unet.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (height, width, self.unet.in_channels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        height, width, _ = self.latent_shape
        return (height * self.vae.downscale, width * self.vae.downscale)


def with_image_size(pipeline: Pipeline, height: int | None, width: int | None) -> Pipeline:
    """The pipeline for pictures of ``height`` x ``width`` pixels; None keeps what it has.

    Raises:
      UserError: a side is no multiple of what the autoencoder makes one latent of.
    """
    height = pipeline.image_size[0] if height is None else height
    width = pipeline.image_size[1] if width is None else width
    downscale = pipeline.vae.downscale
    if min(height, width) < downscale or height % downscale or width % downscale:
        raise UserError(
            f"Pictures of {height}x{width} pixels do not fit pipeline {pipeline.folder}; "
            f"height and width must be multiples of {downscale}."
        )
    return dataclasses.replace(pipeline, latent_size=(height // downscale, width // downscale))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; UserError if it is missing, too large or malformed."""
    if not path.is_file():
        raise UserError(missing(path))
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise UserError(f"File {path} is larger than {_MAX_JSON_BYTES} bytes, which no config is; refusing to read it.")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"File {path} is not valid JSON ({error}); download or copy it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"File {path} must hold a JSON object, not a {type(value).__name__}.")
    return value


@contextlib.contextmanager
def _read_config(folder: Path, default: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The folder's config.json, or the default if it has none; an error inside the ``with`` becomes a UserError."""
    file = folder / "config.json"
    config = read_json(file) if default is None or file.exists() else default
    try:
        yield config
    except UserError as error:
        raise UserError(f"File {file}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"File {file}: its values make no model ({reason}); download or copy it again.") from error


def read_unet_shapes(folder: Path, dtype: Any = jnp.float32) -> tuple[UNet2DConditionModel, Any]:
    """The UNet that ``config.json`` in ``folder`` describes and the shapes of its parameters, both in ``dtype``."""
    with _read_config(folder) as config:
        unet = UNet2DConditionModel.from_config(config, dtype)
        return unet, unet_shapes(unet, dtype)


def read_unet(
    folder: Path, dtype: Any = jnp.float32, *, variant: str | None = None, sharding: Placement = None
) -> tuple[UNet2DConditionModel, Any]:
    """The UNet in ``folder`` and its parameters, both in ``dtype``."""
    unet, shapes = read_unet_shapes(folder, dtype)
    return unet, read_params(open_weights(folder, DIFFUSERS_STEM, variant), shapes, sharding=sharding)


def read_vae_shapes(folder: Path, dtype: Any = jnp.float32) -> tuple[AutoencoderKL, Any]:
    """The autoencoder that ``config.json`` in ``folder`` describes and the shapes of its parameters, in ``dtype``."""
    with _read_config(folder) as config:
        vae = AutoencoderKL.from_config(config, dtype)
        return vae, vae_shapes(vae, dtype)


def read_vae(
    folder: Path, dtype: Any = jnp.float32, *, variant: str | None = None, sharding: Placement = None
) -> tuple[AutoencoderKL, Any]:
    """The autoencoder in ``folder`` and its parameters, both in ``dtype``."""
    vae, shapes = read_vae_shapes(folder, dtype)
    return vae, read_params(open_weights(folder, DIFFUSERS_STEM, variant), shapes, sharding=sharding)


def read_text_encoder_shapes(
    folder: Path, dtype: Any = jnp.float32, *, with_projection: bool = False
) -> tuple[CLIPTextModel, Any]:
    """The text encoder that ``config.json`` in ``folder`` describes and the shapes of its parameters, in ``dtype``."""
    model = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    with _read_config(folder) as config:
        text_encoder = model.from_config(config, dtype)
        return text_encoder, text_encoder_shapes(text_encoder, dtype)


def read_text_encoder(
    folder: Path,
    dtype: Any = jnp.float32,
    *,
    with_projection: bool = False,
    variant: str | None = None,
    sharding: Placement = None,
) -> tuple[CLIPTextModel, Any]:
    """The text encoder in ``folder`` and its parameters, both in ``dtype``; SDXL's second one has a projection."""
    text_encoder, shapes = read_text_encoder_shapes(folder, dtype, with_projection=with_projection)
    return text_encoder, read_params(open_weights(folder, TRANSFORMERS_STEM, variant), shapes, sharding=sharding)


def unet_shapes(unet: UNet2DConditionModel, dtype: Any = jnp.float32) -> Any:
    """Shapes of a UNet's parameters."""
    size = 2 ** (len(unet.block_out_channels) - 1)
    latents, context = jnp.zeros((1, size, size, unet.in_channels)), jnp.zeros((1, 1, unet.cross_attention_dim))
    added = None
    if unet.pooled_dim is not None:
        added = AddedConditions(pooled=jnp.zeros((1, unet.pooled_dim)), time_ids=jnp.zeros((1, 6)))
    return param_shapes(unet, latents, jnp.zeros(1), context, added, dtype=dtype)


def vae_shapes(vae: AutoencoderKL, dtype: Any = jnp.float32) -> Any:
    """Shapes of an autoencoder's parameters."""
    return param_shapes(vae, jnp.zeros((1, vae.downscale, vae.downscale, vae.in_channels)), dtype=dtype)


def text_encoder_shapes(text_encoder: CLIPTextModel, dtype: Any = jnp.float32) -> Any:
    """Shapes of a text encoder's parameters."""
    return param_shapes(text_encoder, jnp.zeros((1, 1), jnp.int32), dtype=dtype)


def clip_shapes(clip: CLIPModel, dtype: Any = jnp.float32) -> Any:
    """Shapes of a CLIP's parameters."""
    timesteps = (jnp.zeros(1),) if clip.step_aware else ()
    pixels = jnp.zeros((1, clip.image_size, clip.image_size, 3))
    return param_shapes(clip, pixels, jnp.zeros((1, 1), jnp.int32), *timesteps, dtype=dtype)


def read_clip(
    path: str | Path,
    *,
    step_aware: bool | None,
    dtype: Any = jnp.float32,
    variant: str | None = None,
    sharding: Placement = None,
) -> tuple[CLIPModel, Any]:
    """A CLIP, such as PickScore_v1 or a released step-aware preference model, and its parameters, both in ``dtype``.

    Args:
      path: a folder with config and weights, or a weight file beside a ``config.json`` (without one it is a ViT-H/14);
        local, or on the hub (see ``resolve_model``).
      step_aware: the model takes timesteps. From the weights of a plain CLIP its time layers start as the identity.
        None: it takes them if the file has time layers.
      variant: of the weight files, such as ``"fp16"``.
      sharding: where the parameters go, see ``read_params``.
    """
    path = resolve_model(path, variant=variant)
    # The released step-aware preference models are bare weight files of PickScore_v1's CLIP.
    folder, default = (path.parent, CLIP_VIT_H) if path.is_file() else (path, None)
    with _read_config(folder, default) as config:
        clip = CLIPModel.from_config(config, step_aware=step_aware is not False, dtype=dtype)
        shapes = clip_shapes(clip, dtype)
    weights = open_file(path) if path.is_file() else open_weights(folder, TRANSFORMERS_STEM, variant)
    # The preference models were saved inside a module that holds the CLIP as "model".
    prefix = "model." if any(key.startswith("model.") for key in weights.arrays) else ""
    if not clip.step_aware or any("t_embedder." in key for key in weights.arrays):
        return clip, read_params(weights, shapes, prefix=prefix, sharding=sharding)
    flat = flax.traverse_util.flatten_dict(shapes)
    shapes = flax.traverse_util.unflatten_dict({k: v for k, v in flat.items() if not is_time_layer(k)})
    plain = read_params(weights, shapes, prefix=prefix, sharding=sharding)
    if step_aware is None:
        return clip.clone(step_aware=False), plain
    return clip, with_identity_time_layers(clip, plain, jax.random.key(0), sharding=sharding)


def read_pipeline(
    folder: str | Path,
    dtype: Any = jnp.float32,
    *,
    variant: str | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    sharding: Placement = None,
) -> Pipeline:
    """Reads a diffusers ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.

    All that can be told from configs is told before weights are read.

    Args:
      folder: the folder with ``model_index.json``, or ``org/name@commit`` on the hub (see ``resolve_model``).
      dtype: compute and storage dtype of the networks.
      variant: of the weight files, such as ``"fp16"``.
      unet: a folder, named in the same way, with a UNet instead of the pipeline's (see ``replaced_parts``).
      vae: one with an autoencoder.
      sharding: where the parameters go, see ``read_params``; paths are those in ``Pipeline.params``.

    Raises:
      UserError: a missing or damaged file, an unsupported config field, weights that do not fit the config, or parts
        that do not fit each other.
    """
    folder = resolve_model(folder, variant=variant)
    if folder.is_file():
        from spo_jax.formats.single_file import read_single_file  # which builds on this module

        return read_single_file(folder, dtype, variant=variant, unet=unet, vae=vae, sharding=sharding)
    index, sdxl = read_index(folder)
    replaced = replaced_parts(unet, vae, variant=variant)
    names = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if sdxl else [])]
    folders = {name: replaced.get(name, folder / name) for name in names}
    parts, shapes = {}, {}
    for name in names:
        parts[name], shapes[name] = _SHAPES[name](folders[name], dtype)
    if "vae" in replaced and (folder / "vae" / "config.json").is_file():
        check_vae(folder, read_vae_shapes(folder / "vae", dtype)[0], folders["vae"], parts["vae"])
    check_parts(folder, parts, folders)
    if not sdxl:
        config_file = folders["unet"] / "config.json"
        parts["unet"] = mended_unet(parts["unet"], read_json(config_file), config_file)
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler_config = scheduler_of(read_json(scheduler_file), scheduler_file, sdxl=sdxl)
    tokenizers = {}
    for name in names[2:]:
        tokenizer = name.replace("text_encoder", "tokenizer")
        tokenizers[tokenizer] = read_tokenizer(folder / tokenizer, parts[name].tower)
    check_lengths(tokenizers)

    chosen = choose_variants(folders, variant)
    weights = {name: open_weights(folders[name], STEMS[name], chosen[name]) for name in names}
    params = {}
    for name in names:
        below = functools.partial(_below, sharding, name) if callable(sharding) else sharding
        params[name] = read_params(weights[name], shapes[name], sharding=below)
    return Pipeline(
        folder=folder,
        scheduler_config=scheduler_config,
        params=params,
        force_zeros_for_empty_prompt=sdxl and bool(index.get("force_zeros_for_empty_prompt", True)),
        replaced=replaced,
        variant=variant,
        **parts,
        **tokenizers,
    )


def read_index(folder: Path) -> tuple[dict[str, Any], bool]:
    """A pipeline's ``model_index.json``, and whether it is SDXL; UserError if it is of another kind."""
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise UserError(
            f"File {folder / 'model_index.json'} describes a {kind!r}; "
            "only StableDiffusionPipeline and StableDiffusionXLPipeline folders are supported."
        )
    return index, kind == "StableDiffusionXLPipeline"


def replaced_parts(
    unet: str | Path | None, vae: str | Path | None, *, variant: str | None = None, weights: bool = True
) -> dict[str, Path]:
    """The folders of parts that come from elsewhere, by "unet" and "vae"; fetches what is not here.

    A part is in the folder that is named, or in its folder ``unet`` or ``vae``: so a pipeline and what trainers save
    (``checkpoint-500``) can be named as well.

    Raises:
      UserError: it is a file, or neither folder has a ``config.json``.
    """
    return {
        name: _part_folder(name, resolve_model(source, variant=variant, weights=weights))
        for name, source in (("unet", unet), ("vae", vae))
        if source
    }


def _part_folder(name: str, path: Path) -> Path:
    if path.is_file():
        raise UserError(f"{path} is a file; --{name} (config.{name}) takes a folder with config.json and weights.")
    inside = path / name
    return inside if not (path / "config.json").is_file() and (inside / "config.json").is_file() else path


def choose_variants(folders: Mapping[str, Path], variant: str | None) -> dict[str, str | None]:
    """The variant of weight files that is read of each part of a pipeline; what is not as asked for is said.

    Without one where there are such files, else the only one that there is. What lacks the one asked for, while other
    parts have it, is read without one.
    """
    if variant is None:
        chosen = {name: choose_variant(folder, STEMS[name], None) for name, folder in folders.items()}
        if any(chosen.values()):
            say_variant({folders[name]: value for name, value in chosen.items() if value})
        return chosen
    have, plain = (
        {name for name, folder in folders.items() if find_weights(folder, STEMS[name], one) is not None}
        for one in (variant, None)
    )
    without = sorted(plain - have) if have else []
    if without:
        listed = ", ".join(str(folders[name]) for name in without)
        notice(f"{listed}: there are no {variant} weights, so those without a variant are read.")
    return {name: None if name in without else variant for name in folders}


def _below(sharding: Any, name: str, path: tuple[str, ...], shape: tuple[int, ...]) -> Any:
    return sharding((name, *path), shape)


# What the names of a part's weight files begin with, and how its config is read.
STEMS = {
    "unet": DIFFUSERS_STEM,
    "vae": DIFFUSERS_STEM,
    "text_encoder": TRANSFORMERS_STEM,
    "text_encoder_2": TRANSFORMERS_STEM,
}
_SHAPES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "unet": read_unet_shapes,
    "vae": read_vae_shapes,
    "text_encoder": read_text_encoder_shapes,
    "text_encoder_2": functools.partial(read_text_encoder_shapes, with_projection=True),
}
