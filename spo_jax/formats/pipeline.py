"""Reading a pipeline: a diffusers folder, or a single file in the original layout of Stable Diffusion."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError
from spo_jax.formats.hub import resolve_model
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.networks import PARTS, build
from spo_jax.formats.pipeline_files import (
    PipelineFiles,
    check_parts,
    check_vae,
    mended_unet,
    open_folder,
    scheduler_of,
    tokenizer_of,
)
from spo_jax.formats.single_file import open_single_file
from spo_jax.formats.tokenizers import BlankTokenizer, check_lengths, read_tokenizer
from spo_jax.formats.weights import TRANSFORMERS_STEM, Placement, open_file, open_weights, read_params
from spo_jax.models import AutoencoderKL, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel
from spo_jax.models.clip import is_time_layer, with_identity_time_layers
from spo_jax.models.published import CLIP_VIT_H
from spo_jax.types import Tokenizer


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The parts of a text-to-image pipeline."""

    folder: Path  # or the single file
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Tokenizer
    scheduler_config: Json  # the parsed scheduler_config.json, mended as diffusers mends it
    params: dict[str, PyTree]  # a tree for each of "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2"
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: Tokenizer | None = None
    force_zeros_for_empty_prompt: bool = False  # an empty negative prompt stands for zeros, not for its embeddings
    latent_size: tuple[int, int] | None = None  # [h, w] for images of another size than the UNet was trained for
    replaced: Mapping[str, Path] = dataclasses.field(
        default_factory=dict
    )  # folders of parts that are not in ``folder``
    variant: str | None = None  # of the weight files that was asked for

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of the latents, at the resolution the UNet was trained for unless ``latent_size`` says another."""
        size = self.latent_size or self.unet.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (height, width, self.unet.in_channels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        height, width, _ = self.latent_shape
        return (height * self.vae.downscale, width * self.vae.downscale)


def with_image_size(pipeline: Pipeline, height: int | None, width: int | None) -> Pipeline:
    """The pipeline for images of ``height`` x ``width`` pixels; None keeps what it has.

    UserError if a side is no multiple of what the autoencoder makes one latent of.
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


def with_unet(pipeline: Pipeline, *, remat: bool, attention: str) -> Pipeline:
    """The pipeline with a UNet that computes in another way.

    ``remat`` computes it again in the backward pass instead of keeping what is inside its layers; ``attention`` is one
    of ``kernels.attention.KINDS``.
    """
    return dataclasses.replace(pipeline, unet=pipeline.unet.clone(remat=remat, attention=attention))


def open_pipeline(
    model: str | Path,
    *,
    variant: str | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    weights: bool = True,
) -> PipelineFiles:
    """The files of a pipeline, whose values are not read yet; fetches what is not here.

    Args:
      model: a folder with ``model_index.json`` or a single file, local or on the hub (see ``resolve_model``).
      variant: of the weight files, such as ``"fp16"``.
      unet: a folder, named in the same way, with a UNet instead of the pipeline's own; or a pipeline or what trainers
        save (``checkpoint-500``), whose folder ``unet`` is taken. So is ``vae``, with an autoencoder.
      weights: False fetches configs and tokenizers only.

    Raises:
      UserError: a file is missing or damaged, or the pipeline is of another kind.
    """
    path = resolve_model(model, variant=variant, weights=weights)
    replaced = {
        part: _part_folder(part, resolve_model(source, variant=variant, weights=weights))
        for part, source in (("unet", unet), ("vae", vae))
        if source
    }
    if not path.is_file():
        return open_folder(path, variant, replaced)
    if variant and not replaced:
        raise UserError(f"File {path} has no variants; leave out --variant or config.variant ({variant!r}).")
    return dataclasses.replace(open_single_file(path), variant=variant).with_parts(replaced)


def _part_folder(part: str, path: Path) -> Path:
    if path.is_file():
        raise UserError(f"{path} is a file; --{part} (config.{part}) takes a folder with config.json and weights.")
    inside = path / part
    return inside if not (path / "config.json").is_file() and (inside / "config.json").is_file() else path


def described(files: PipelineFiles, dtype: DTypeLike) -> Pipeline:
    """The pipeline that its configs describe, with shapes for ``params`` and tokenizers that give blank ids;
    UserError if a config is not supported, or the parts do not fit each other."""
    built = {part: files.network(part, dtype) for part in files.configs}
    networks = {part: network for part, (network, _) in built.items()}
    places = {part: files.folders.get(part, files.path) for part in networks}
    if files.own_vae is not None:
        own, _ = build(AutoencoderKL, files.own_vae, dtype, where=f"File {files.path}, vae")
        check_vae(files.path, own, places["vae"], networks["vae"])
    check_parts(files.path, networks, places)
    if not files.is_xl:
        networks["unet"] = mended_unet(networks["unet"], files.configs["unet"], files.source("unet"))
    encoders = {part: network for part, network in networks.items() if tokenizer_of(part)}
    blank = {part: BlankTokenizer(one.config.get("max_position_embeddings", 77)) for part, one in encoders.items()}
    return Pipeline(
        folder=files.path,
        scheduler_config=scheduler_of(files.scheduler, files.source("scheduler"), sdxl=files.is_xl),
        params={part: shapes for part, (_, shapes) in built.items()},
        force_zeros_for_empty_prompt=files.is_xl and bool(files.index.get("force_zeros_for_empty_prompt", True)),
        replaced=files.replaced,
        variant=files.variant,
        tokenizer=blank["text_encoder"],
        tokenizer_2=blank.get("text_encoder_2"),
        **networks,
    )


def read_pipeline(
    model: str | Path,
    dtype: DTypeLike = jnp.float32,
    *,
    variant: str | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    sharding: Placement = None,
) -> Pipeline:
    """Reads a ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``; weights after all configs are checked.

    Args:
      model: a folder or a single file, see ``open_pipeline``; so are ``variant``, ``unet`` and ``vae``.
      dtype: of the computation and of the parameters.
      sharding: where the parameters go, see ``read_params``; paths are those in ``Pipeline.params``.

    Raises:
      UserError: a missing or damaged file, an unsupported config field, weights that do not fit the config, or parts
        that do not fit each other.
    """
    files = open_pipeline(model, variant=variant, unet=unet, vae=vae)
    pipeline = described(files, dtype)
    tokenizers = {
        name: read_tokenizer(files.tokenizers[name], getattr(pipeline, part).tower)
        for part in files.configs
        if (name := tokenizer_of(part))
    }
    check_lengths(tokenizers)
    # The keys of all parts are checked before one value is read.
    weights = {part: files.weights(part, shapes) for part, shapes in pipeline.params.items()}
    params = {}
    for part, shapes in pipeline.params.items():
        below = (lambda path, shape, part=part: sharding((part, *path), shape)) if callable(sharding) else sharding
        params[part] = read_params(weights[part], shapes, sharding=below)
    return dataclasses.replace(pipeline, params=params, **tokenizers)


def read_part(
    part: str, folder: Path, dtype: DTypeLike = jnp.float32, *, variant: str | None = None, sharding: Placement = None
) -> tuple[nn.Module, PyTree]:
    """The network of one part, "unet", "vae", "text_encoder" or "text_encoder_2", and its parameters, from its folder;
    arguments as of ``read_pipeline``."""
    file = folder / "config.json"
    network, shapes = build(PARTS[part].model, read_json(file), dtype, where=f"File {file}")
    return network, read_params(open_weights(folder, PARTS[part].stem, variant), shapes, sharding=sharding)


read_unet, read_vae = functools.partial(read_part, "unet"), functools.partial(read_part, "vae")
read_text_encoder = functools.partial(read_part, "text_encoder")


def read_clip(
    path: str | Path,
    *,
    step_aware: bool | None,
    dtype: DTypeLike = jnp.float32,
    variant: str | None = None,
    sharding: Placement = None,
) -> tuple[CLIPModel, PyTree]:
    """A CLIP, such as PickScore_v1 or a released step-aware preference model, and its parameters, both in ``dtype``.

    Args:
      path: a folder with config and weights, or a weight file beside a ``config.json`` (without one it is a ViT-H/14);
        local, or on the hub (see ``resolve_model``).
      step_aware: whether the model takes timesteps. From the weights of a plain CLIP its time layers start as the
        identity. None: it takes them if the file has time layers.
      dtype: and ``variant`` and ``sharding``, as of ``read_pipeline``.
    """
    path = resolve_model(path, variant=variant)
    is_file = path.is_file()
    file = (path.parent if is_file else path) / "config.json"
    # The released step-aware preference models are bare weight files of PickScore_v1's CLIP.
    config = CLIP_VIT_H if is_file and not file.exists() else read_json(file)
    clip, shapes = build(CLIPModel, config, dtype, where=f"File {file}", step_aware=step_aware is not False)
    weights = open_file(path) if is_file else open_weights(path, TRANSFORMERS_STEM, variant)
    # The preference models were saved inside a module that holds the CLIP as "model".
    prefix = "model." if any(key.startswith("model.") for key in weights.arrays) else ""
    is_plain = clip.step_aware and not any("t_embedder." in key for key in weights.arrays)
    if is_plain:
        flat = flax.traverse_util.flatten_dict(shapes)
        shapes = flax.traverse_util.unflatten_dict({k: v for k, v in flat.items() if not is_time_layer(k)})
    params = read_params(weights, shapes, prefix=prefix, sharding=sharding)
    if is_plain and step_aware is None:
        return clip.clone(step_aware=False), params
    return clip, with_identity_time_layers(clip, params, jax.random.key(0), sharding=sharding) if is_plain else params
