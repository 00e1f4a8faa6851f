"""A diffusers pipeline folder: ``model_index.json``, unet, vae, text_encoder, tokenizer, scheduler."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spo_jax.checkpoints.safetensors_io import param_shapes, read_params
from spo_jax.errors import UserError
from spo_jax.models import AutoencoderKL, CLIPModel, CLIPTextModel, UNet2DConditionModel

_MAX_JSON_BYTES = 16 * 2**20
_DIFFUSION_WEIGHTS = "diffusion_pytorch_model.safetensors"
_TRANSFORMERS_WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The parts of a text-to-image pipeline.

    ``params`` holds a tree for each of ``"unet"``, ``"vae"`` and ``"text_encoder"``; ``scheduler_config`` is the parsed
    ``scheduler/scheduler_config.json`` and ``tokenizer`` a transformers tokenizer.
    """

    folder: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Any
    scheduler_config: dict[str, Any]
    params: dict[str, Any]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of the latents at the resolution the UNet was trained for."""
        size = self.unet.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (height, width, self.unet.in_channels)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; UserError if it is missing, too large or malformed."""
    if not path.is_file():
        raise UserError(f"File {path} does not exist; is {path.parent} a complete model folder?")
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
def _read_config(folder: Path) -> Iterator[dict[str, Any]]:
    """The folder's config.json; what is wrong with it inside the ``with`` becomes a UserError that names it."""
    file = folder / "config.json"
    config = read_json(file)
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
        size = 2 ** (len(unet.block_out_channels) - 1)
        shapes = param_shapes(
            unet,
            jnp.zeros((1, size, size, unet.in_channels)),
            jnp.zeros(1),
            jnp.zeros((1, 1, unet.cross_attention_dim)),
            dtype=dtype,
        )
    return unet, shapes


def read_unet(folder: Path, dtype: Any = jnp.float32) -> tuple[UNet2DConditionModel, Any]:
    """The UNet in ``folder`` and its parameters, both in ``dtype``."""
    unet, shapes = read_unet_shapes(folder, dtype)
    return unet, read_params(folder / _DIFFUSION_WEIGHTS, shapes)


def read_vae(folder: Path, dtype: Any = jnp.float32) -> tuple[AutoencoderKL, Any]:
    """The autoencoder in ``folder`` and its parameters, both in ``dtype``."""
    with _read_config(folder) as config:
        vae = AutoencoderKL.from_config(config, dtype)
        shapes = param_shapes(vae, jnp.zeros((1, vae.downscale, vae.downscale, vae.in_channels)), dtype=dtype)
    return vae, read_params(folder / _DIFFUSION_WEIGHTS, shapes)


def read_text_encoder(folder: Path, dtype: Any = jnp.float32) -> tuple[CLIPTextModel, Any]:
    """The text encoder in ``folder`` and its parameters, both in ``dtype``."""
    with _read_config(folder) as config:
        text_encoder = CLIPTextModel.from_config(config, dtype)
        shapes = param_shapes(text_encoder, jnp.zeros((1, 1), jnp.int32), dtype=dtype)
    return text_encoder, read_params(folder / _TRANSFORMERS_WEIGHTS, shapes)


def clip_shapes(clip: CLIPModel, dtype: Any = jnp.float32) -> Any:
    """Shapes of a CLIP's parameters."""
    timesteps = (jnp.zeros(1),) if clip.step_aware else ()
    pixels = jnp.zeros((1, clip.image_size, clip.image_size, 3))
    return param_shapes(clip, pixels, jnp.zeros((1, 1), jnp.int32), *timesteps, dtype=dtype)


def read_clip(folder: Path, *, step_aware: bool, dtype: Any = jnp.float32) -> tuple[CLIPModel, Any]:
    """A CLIP in ``folder`` (``config.json``, ``model.safetensors``) and its parameters, both in ``dtype``."""
    with _read_config(folder) as config:
        clip = CLIPModel.from_config(config, step_aware=step_aware, dtype=dtype)
        shapes = clip_shapes(clip, dtype)
    prefix = "model." if step_aware else ""
    return clip, read_params(folder / _TRANSFORMERS_WEIGHTS, shapes, prefix=prefix)


def read_tokenizer(folder: Path) -> Any:
    """The CLIP tokenizer in ``folder``."""
    from transformers import CLIPTokenizer  # takes seconds to import; nothing else here needs it

    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"File {folder / name} does not exist; is {folder} a CLIP tokenizer folder?")
    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


def tokenize(tokenizer: Any, texts: list[str]) -> Any:
    """Token ids int32 [B, model_max_length], padded and truncated as Stable Diffusion does."""
    ids = tokenizer(
        texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="np"
    )["input_ids"]
    return ids.astype("int32")


def read_pipeline(folder: str | Path, dtype: Any = jnp.float32) -> Pipeline:
    """Reads a local diffusers ``StableDiffusionPipeline`` folder.

    Args:
      folder: the folder with ``model_index.json``.
      dtype: compute and storage dtype of the networks.

    Raises:
      UserError: a missing or damaged file, an unsupported config field, or weights that do not fit the config.
    """
    folder = Path(folder)
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise UserError(
            f"File {folder / 'model_index.json'} describes a {index.get('_class_name')!r}; "
            "only StableDiffusionPipeline folders are supported."
        )
    unet, unet_params = read_unet(folder / "unet", dtype)
    vae, vae_params = read_vae(folder / "vae", dtype)
    text_encoder, text_params = read_text_encoder(folder / "text_encoder", dtype)
    width = text_encoder.config["hidden_size"]
    if width != unet.cross_attention_dim:
        raise UserError(
            f"Pipeline {folder}: the text encoder gives {width} channels, but the UNet's cross_attention_dim is "
            f"{unet.cross_attention_dim}; the two do not belong together."
        )
    return Pipeline(
        folder=folder,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=read_tokenizer(folder / "tokenizer"),
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        params=jax.tree.map(jnp.asarray, {"unet": unet_params, "vae": vae_params, "text_encoder": text_params}),
    )
