"""A diffusers pipeline folder: ``model_index.json``, unet, vae, text_encoder, tokenizer, scheduler.

SDXL has ``text_encoder_2`` and ``tokenizer_2`` as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from spo_jax.checkpoints.hub import missing, resolve_model
from spo_jax.checkpoints.safetensors_io import param_shapes
from spo_jax.checkpoints.weights import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    Placement,
    open_file,
    open_weights,
    read_params,
)
from spo_jax.errors import UserError
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
    ``latent_size`` [h, w] is there for pictures of another size than the UNet was trained for.
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
      UserError: the autoencoder and the UNet cannot halve the size often enough.
    """
    height = pipeline.image_size[0] if height is None else height
    width = pipeline.image_size[1] if width is None else width
    downscale = pipeline.vae.downscale
    multiple = downscale * 2 ** (len(pipeline.unet.block_out_channels) - 1)
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise UserError(
            f"Pictures of {height}x{width} pixels do not fit pipeline {pipeline.folder}; "
            f"height and width must be multiples of {multiple}."
        )
    return dataclasses.replace(pipeline, latent_size=(height // downscale, width // downscale))


def with_vae(
    pipeline: Pipeline, folder: str | Path, dtype: Any = jnp.float32, *, sharding: Placement = None
) -> Pipeline:
    """The pipeline with the autoencoder of another folder, local or on the hub.

    Raises:
      UserError: it cannot be read, or its latents are others than the UNet's.
    """
    vae, params = read_vae(resolve_model(folder), dtype, sharding=sharding)
    if (vae.latent_channels, vae.downscale) != (pipeline.unet.in_channels, pipeline.vae.downscale):
        raise UserError(
            f"Autoencoder {folder} has {vae.latent_channels} channels at 1/{vae.downscale} of the size, but pipeline "
            f"{pipeline.folder} needs {pipeline.unet.in_channels} at 1/{pipeline.vae.downscale}."
        )
    return dataclasses.replace(pipeline, vae=vae, params={**pipeline.params, "vae": params})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; UserError if it is missing, too large or malformed."""
    if not path.is_file():
        raise UserError(missing(path))
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise UserError(f"File {path} is larger than {_MAX_JSON_BYTES} bytes, which no config is; refusing to read it.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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


def read_vae(
    folder: Path, dtype: Any = jnp.float32, *, variant: str | None = None, sharding: Placement = None
) -> tuple[AutoencoderKL, Any]:
    """The autoencoder in ``folder`` and its parameters, both in ``dtype``."""
    with _read_config(folder) as config:
        vae = AutoencoderKL.from_config(config, dtype)
        shapes = vae_shapes(vae, dtype)
    return vae, read_params(open_weights(folder, DIFFUSERS_STEM, variant), shapes, sharding=sharding)


def read_text_encoder(
    folder: Path,
    dtype: Any = jnp.float32,
    *,
    with_projection: bool = False,
    variant: str | None = None,
    sharding: Placement = None,
) -> tuple[CLIPTextModel, Any]:
    """The text encoder in ``folder`` and its parameters, both in ``dtype``; SDXL's second one has a projection."""
    model = CLIPTextModelWithProjection if with_projection else CLIPTextModel
    with _read_config(folder) as config:
        text_encoder = model.from_config(config, dtype)
        shapes = text_encoder_shapes(text_encoder, dtype)
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


def read_tokenizer(folder: str | Path) -> Any:
    """The CLIP tokenizer in ``folder``, local or on the hub (see ``resolve_model``)."""
    from transformers import CLIPTokenizer  # takes seconds to import; nothing else here needs it

    folder = resolve_model(folder, weights=False)
    # transformers 5 saves one tokenizer.json, published pipelines have the two files that it is made of.
    vocabulary = ["tokenizer.json"] if (folder / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    for name in (*vocabulary, "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(missing(folder / name))
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def tokenize(tokenizer: Any, texts: list[str]) -> Any:
    """Token ids int32 [B, model_max_length], padded and truncated as Stable Diffusion does."""
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="np"
    )["input_ids"]
    return ids.astype("int32")


def tokenize_prompts(pipeline: Pipeline, texts: list[str]) -> tuple[Any, ...]:
    """Token ids int32 [B, L] for each text encoder of the pipeline."""
    tokenizers = [pipeline.tokenizer] if pipeline.tokenizer_2 is None else [pipeline.tokenizer, pipeline.tokenizer_2]
    return tuple(tokenize(tokenizer, texts) for tokenizer in tokenizers)


def read_pipeline(
    folder: str | Path, dtype: Any = jnp.float32, *, variant: str | None = None, sharding: Placement = None
) -> Pipeline:
    """Reads a diffusers ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.

    Args:
      folder: the folder with ``model_index.json``, or ``org/name@commit`` on the hub (see ``resolve_model``).
      dtype: compute and storage dtype of the networks.
      variant: of the weight files, such as ``"fp16"``.
      sharding: where the parameters go, see ``read_params``; paths are those in ``Pipeline.params``.

    Raises:
      UserError: a missing or damaged file, an unsupported config field, or weights that do not fit the config.
    """
    folder = resolve_model(folder, variant=variant)
    if folder.is_file():
        from spo_jax.checkpoints.single_file import read_single_file  # which builds on this module

        return read_single_file(folder, dtype, variant=variant, sharding=sharding)
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise UserError(
            f"File {folder / 'model_index.json'} describes a {kind!r}; "
            "only StableDiffusionPipeline and StableDiffusionXLPipeline folders are supported."
        )

    params: dict[str, Any] = {}

    def read(reader: Callable[..., tuple[Any, Any]], name: str, **kwargs: Any) -> Any:
        below = (lambda path, shape: sharding((name, *path), shape)) if callable(sharding) else sharding
        model, params[name] = reader(folder / name, dtype, variant=variant, sharding=below, **kwargs)
        return model

    unet = read(read_unet, "unet")
    vae = read(read_vae, "vae")
    text_encoder = read(read_text_encoder, "text_encoder")
    extra: dict[str, Any] = {}
    if kind == "StableDiffusionXLPipeline":
        extra["text_encoder_2"] = read(read_text_encoder, "text_encoder_2", with_projection=True)
        extra["tokenizer_2"] = read_tokenizer(folder / "tokenizer_2")
        extra["force_zeros_for_empty_prompt"] = bool(index.get("force_zeros_for_empty_prompt", True))
    check_widths(folder, unet, text_encoder, extra.get("text_encoder_2"))
    return Pipeline(
        folder=folder,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=read_tokenizer(folder / "tokenizer"),
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        params=params,
        **extra,
    )


def check_widths(
    folder: Path,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    text_encoder_2: CLIPTextModelWithProjection | None,
) -> None:
    """Raises UserError if the text encoders do not give what the UNet takes."""
    width, pooled = text_encoder.hidden_size, None
    if text_encoder_2 is not None:
        width, pooled = width + text_encoder_2.hidden_size, text_encoder_2.projection_dim
    if width != unet.cross_attention_dim:
        raise UserError(
            f"Pipeline {folder}: the text encoders give {width} channels, but the UNet's cross_attention_dim is "
            f"{unet.cross_attention_dim}; they do not belong together."
        )
    if pooled != unet.pooled_dim:
        raise UserError(
            f"Pipeline {folder}: the text encoders give a pooled width of {pooled}, but the UNet's "
            f"projection_class_embeddings_input_dim asks for {unet.pooled_dim}; they do not belong together."
        )
