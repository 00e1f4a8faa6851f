"""The files of a pipeline, opened but not read: configs, tokenizers, weights. A folder or a single file has them.

What the parts must have in common is checked here, and configs of 2022 are mended as diffusers mends them.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.diffusion.schedule import FILE, make_schedule
from spo_jax.errors import UserError, notice
from spo_jax.files import write_text
from spo_jax.formats.hub import resolve_model
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.networks import PARTS, build
from spo_jax.formats.weights import Weights, find_weights, open_weights, read_params
from spo_jax.models import AutoencoderKL, UNet2DConditionModel

INDEX, XL = "model_index.json", "StableDiffusionXLPipeline"
SCHEDULER = "scheduler/scheduler_config.json"
# Parts that a pipeline may do without; diffusers then wants null in their place.
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
# Models that take more than latents and a prompt, by the channels of a UNet whose autoencoder has four.
OTHER_KINDS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an InstructPix2Pix model", 9: "an inpainting model"}

ReadConfig = Callable[[Path, str], Json]  # the JSON object for a folder and the name of a file in it


def read_config(folder: Path, file: str) -> Json:
    """The JSON object in a file of a local folder."""
    return read_json(folder / file)


@dataclasses.dataclass(frozen=True)
class PipelineFiles:
    """What a pipeline is read from. Its parts are "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2"."""

    path: Path  # the folder or the single file
    index: Json  # the content of model_index.json
    configs: dict[str, Json]  # the config.json of each part
    scheduler: Json  # the content of scheduler_config.json
    tokenizers: dict[str, str | Path]  # folders, or names of the hub, by "tokenizer" and "tokenizer_2"
    folders: dict[str, Path] = dataclasses.field(default_factory=dict)  # of the parts that are not in a single file
    variant: str | None = None  # of the weight files in ``folders``
    in_file: Callable[[str, PyTree], Weights] | None = None  # in a single file: the weights of a part of such shapes
    replaced: dict[str, Path] = dataclasses.field(default_factory=dict)  # ``folders`` instead of the pipeline's own
    own_vae: Json | None = None  # the config of the autoencoder that is replaced, if it is there

    @property
    def is_xl(self) -> bool:
        """Whether the pipeline is SDXL."""
        return self.index.get("_class_name") == XL

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, as the scheduler's config has it."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that the UNet was trained for, if its config says so."""
        size = self.configs["unet"].get("sample_size")
        height, width = size if isinstance(size, list | tuple) else (size, size)
        downscale = 2 ** (len(self.configs["vae"].get("block_out_channels", ())) - 1)
        return None if size is None else (int(height * downscale), int(width * downscale))

    def source(self, name: str) -> Path:
        """The file that messages name for the config of a part, or of the "scheduler"."""
        if name == "scheduler":
            return self.path if self.in_file else self.path / SCHEDULER
        return self.folders[name] / "config.json" if name in self.folders else self.path

    def network(self, part: str, dtype: DTypeLike) -> tuple[nn.Module, PyTree]:
        """The network of a part and the shapes of its parameters; errors as of ``networks.build``."""
        where = f"File {self.source(part)}" + ("" if part in self.folders else f", {part}")
        return build(PARTS[part].model, self.configs[part], dtype, where=where)

    def weights(self, part: str, shapes: PyTree) -> Weights:
        """The weights of a part, whose parameters have these shapes; errors as of ``open_weights``."""
        if part not in self.folders:
            assert self.in_file is not None
            return self.in_file(part, shapes)
        folder, stem, variant = self.folders[part], PARTS[part].stem, self.variant
        there = {name for name, other in self.folders.items() if find_weights(other, PARTS[name].stem, variant)}
        if variant and there and part not in there and find_weights(folder, stem, None):
            notice(f"{folder}: there are no {variant} weights, so those without a variant are read.")
            variant = None
        return open_weights(folder, stem, variant)

    def read(self, part: str, dtype: DTypeLike) -> PyTree:
        """The parameters of a part; errors as of ``network``, ``weights`` and ``read_params``."""
        shapes = self.network(part, dtype)[1]
        return read_params(self.weights(part, shapes), shapes)

    def with_parts(self, replaced: Mapping[str, Path], read: ReadConfig = read_config) -> PipelineFiles:
        """The files with some parts from other folders."""
        configs = self.configs | {part: read(folder, "config.json") for part, folder in replaced.items()}
        return dataclasses.replace(
            self,
            configs={part: configs[part] for part in PARTS if part in configs},
            folders={**self.folders, **replaced},
            replaced=dict(replaced),
            own_vae=self.configs.get("vae") if "vae" in replaced else None,
        )


def open_folder(
    folder: Path,
    variant: str | None = None,
    replaced: Mapping[str, Path] | None = None,
    read: ReadConfig = read_config,
) -> PipelineFiles:
    """The files of a diffusers pipeline folder; parts that are ``replaced`` by other folders need not be in it."""
    index, replaced = read(folder, INDEX), replaced or {}
    kind = index.get("_class_name")
    if kind not in ("StableDiffusionPipeline", XL):
        raise UserError(
            f"File {folder / INDEX} describes a {kind!r}; "
            "only StableDiffusionPipeline and StableDiffusionXLPipeline folders are supported."
        )
    folders = {part: folder / part for part in PARTS if part != "text_encoder_2" or kind == XL}
    own = [part for part in folders if part not in replaced]
    if "vae" in replaced and (folders["vae"] / "config.json").is_file():
        own.append("vae")  # what replaces it is compared with it
    files = PipelineFiles(
        path=folder,
        index=index,
        configs={part: read(folder, f"{part}/config.json") for part in own},
        scheduler=read(folder, SCHEDULER),
        tokenizers={name: folder / name for name in map(tokenizer_of, folders) if name},
        folders=folders,
        variant=variant,
    )
    return files.with_parts(replaced, read)


def tokenizer_of(part: str) -> str | None:
    """The name of the tokenizer that goes with a part: "tokenizer" or "tokenizer_2"; None for no text encoder."""
    return part.replace("text_encoder", "tokenizer") if part.startswith("text_encoder") else None


def write_configs(files: PipelineFiles, folder: Path) -> None:
    """Writes a diffusers folder of the pipeline that lacks nothing but weights."""
    index = {name: value for name, value in files.index.items() if not isinstance(value, list)}
    index |= {part: [PARTS[part].library, PARTS[part].model.__name__] for part in files.configs}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in files.tokenizers}
    index |= {"scheduler": ["diffusers", files.scheduler["_class_name"]], **{part: [None, None] for part in OPTIONAL}}
    if not files.is_xl:
        index["requires_safety_checker"] = False
    configs = {f"{part}/config.json": config for part, config in files.configs.items()}
    for name, value in {INDEX: index, SCHEDULER: files.scheduler, **configs}.items():
        write_text(folder / name, json.dumps(value, indent=2) + "\n")
    for name, source in files.tokenizers.items():
        shutil.copytree(resolve_model(source, weights=False), folder / name, copy_function=shutil.copyfile)


# ------------------------------------------------------------------------------------------------------------ checks
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
    wrong = {"steps_offset": config.get("steps_offset", 0) != 1, "clip_sample": config.get("clip_sample") is True}
    mends = {name: value for name, value in (("steps_offset", 1), ("clip_sample", False)) if wrong[name]}
    for name, value in mends.items():
        notice(f"File {file}: {name} = {config.get(name)!r} is taken as {value}, as diffusers does.")
    return config | mends
