"""What the parts of a pipeline must have in common, and what diffusers mends in configs of 2022."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn

from spo_jax.diffusion.schedule import FILE, make_schedule
from spo_jax.errors import UserError, notice
from spo_jax.formats.json_files import Json
from spo_jax.models import AutoencoderKL, UNet2DConditionModel

# Models that take more than latents and a prompt, by the channels of a UNet whose autoencoder has four.
OTHER_KINDS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix model", 9: "an inpainting model"}


def check_parts(path: Path, parts: Mapping[str, nn.Module], where: Mapping[str, Path]) -> None:
    """Raises UserError if the parts of a pipeline do not belong together; ``where`` has their folders, for messages."""
    unet, vae = parts["unet"], parts["vae"]
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise UserError(
            f"Autoencoder {where['vae']} has {vae.in_channels} channels in and {vae.out_channels} out; pictures have 3."
        )
    if unet.in_channels != vae.latent_channels:
        kind = OTHER_KINDS.get(unet.in_channels) if vae.latent_channels == 4 else None
        raise UserError(
            f"UNet {where['unet']} takes {unet.in_channels} channels (in_channels), but the latents of autoencoder "
            f"{where['vae']} have {vae.latent_channels}; "
            + (f"this is {kind}, and only text-to-image models work here." if kind else "they do not belong together.")
        )
    if unet.out_channels != unet.in_channels:
        raise UserError(
            f"UNet {where['unet']} gives {unet.out_channels} channels (out_channels) for {unet.in_channels}; models "
            "that predict a variance as well do not work here."
        )
    width, pooled = parts["text_encoder"].hidden_size, None
    if "text_encoder_2" in parts:
        width, pooled = width + parts["text_encoder_2"].hidden_size, parts["text_encoder_2"].projection_dim
    if width != unet.cross_attention_dim:
        raise UserError(
            f"Pipeline {path}: the text encoders give {width} channels, but the cross_attention_dim of UNet "
            f"{where['unet']} is {unet.cross_attention_dim}; they do not belong together."
        )
    if pooled != unet.pooled_dim:
        raise UserError(
            f"Pipeline {path}: the text encoders give a pooled width of {pooled}, but the "
            f"projection_class_embeddings_input_dim of UNet {where['unet']} asks for {unet.pooled_dim}; they do not "
            "belong together."
        )


def check_vae(path: Path, own: AutoencoderKL, folder: Path, vae: AutoencoderKL) -> None:
    """Raises UserError if an autoencoder's latents differ in shape from those of the pipeline's own one."""
    if (vae.latent_channels, vae.downscale) != (own.latent_channels, own.downscale):
        raise UserError(
            f"Autoencoder {folder} has {vae.latent_channels} channels at 1/{vae.downscale} of the size, but pipeline "
            f"{path} needs {own.latent_channels} at 1/{own.downscale}."
        )
    if vae.scaling_factor != own.scaling_factor:
        notice(
            f"The scaling_factor of autoencoder {folder} is {vae.scaling_factor}, that of pipeline {path} "
            f"{own.scaling_factor}: was the UNet trained with such latents?"
        )


def mended_unet(unet: UNet2DConditionModel, config: Json, file: Path) -> UNet2DConditionModel:
    """The UNet with the size that diffusers' ``StableDiffusionPipeline`` gives to one of its first months."""
    version = re.match(r"0\.(\d+)", str(config.get("_diffusers_version", "")))
    size = unet.sample_size
    if version is None or int(version[1]) >= 9 or not isinstance(size, int) or size >= 64:
        return unet
    notice(f"File {file}: sample_size = {size} of diffusers {version.string} is taken as 64, as diffusers does.")
    return unet.clone(sample_size=64)


def scheduler_of(config: Json, file: str | Path, *, sdxl: bool) -> Json:
    """A scheduler's config for ``make_schedule`` (which may refuse it by UserError): with its file's name, and changed
    where ``StableDiffusionPipeline`` changes it."""
    config = {**config, FILE: str(file)}
    make_schedule(config, 1)
    if sdxl:
        if config.get("clip_sample") is None:
            # Latents exceed diffusers' default of [-1, 1]; the published model says False.
            notice(f"File {file} has no clip_sample, which is then off here; diffusers' DDIM would clip latents.")
        return config
    mends: Json = {}
    if config.get("steps_offset", 0) != 1:
        mends["steps_offset"] = 1
    if config.get("clip_sample") is True:
        mends["clip_sample"] = False
    for name, value in mends.items():
        notice(f"File {file}: {name} = {config.get(name)!r} is taken as {value}, as diffusers does.")
    return config | mends
