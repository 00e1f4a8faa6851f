"""The files of a pipeline, opened but not read: configs, tokenizers, weights. A folder or a single file has them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError, notice
from spo_jax.files import write_text
from spo_jax.formats.hub import resolve_model
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.networks import PARTS, build
from spo_jax.formats.weights import Placement, Weights, find_weights, open_weights, read_params

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
_NO_PARTS = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}

ReadConfig = Callable[[Path, str], Json]  # the JSON object for a folder and the name of a file in it


def read_config(folder: Path, file: str) -> Json:
    """The JSON object in a file of a local folder."""
    return read_json(folder / file)


@dataclasses.dataclass(frozen=True)
class PipelineFiles:
    """What a pipeline is read from. Its parts are "unet", "vae", "text_encoder" and, for SDXL, "text_encoder_2".

    Attributes:
      path: the folder or the single file.
      index: the content of ``model_index.json``.
      configs: the ``config.json`` of each part.
      scheduler: the content of ``scheduler_config.json``.
      tokenizers: a folder or a name of the hub for each text encoder, by "tokenizer" and "tokenizer_2".
      folders: where each part lies that is not in a single file.
      variant: of the weight files in ``folders``.
      in_file: gives the weights of a part in the single file, for its name and the shapes of its parameters.
      replaced: those of ``folders`` that take the place of the pipeline's own parts.
      own_vae: the config of the autoencoder that is replaced, if it is there.
    """

    path: Path
    index: Json
    configs: dict[str, Json]
    scheduler: Json
    tokenizers: dict[str, str | Path]
    folders: dict[str, Path] = dataclasses.field(default_factory=dict)
    variant: str | None = None
    in_file: Callable[[str, PyTree], Weights] | None = None
    replaced: dict[str, Path] = dataclasses.field(default_factory=dict)
    own_vae: Json | None = None

    @property
    def is_xl(self) -> bool:
        """Whether the pipeline is SDXL."""
        return is_xl(self.index)

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
        if variant and find_weights(folder, stem, None) and not find_weights(folder, stem, variant):
            others = (find_weights(other, PARTS[name].stem, variant) for name, other in self.folders.items())
            if any(others):
                notice(f"{folder}: there are no {variant} weights, so those without a variant are read.")
                variant = None
        return open_weights(folder, stem, variant)

    def read(self, part: str, dtype: DTypeLike, *, sharding: Placement = None) -> PyTree:
        """The parameters of a part; errors as of ``network``, ``weights`` and ``read_params``."""
        shapes = self.network(part, dtype)[1]
        return read_params(self.weights(part, shapes), shapes, sharding=sharding)

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
    """The files of a diffusers pipeline folder; parts that are ``replaced`` by other folders need not be in it.

    Raises:
      UserError: a config is missing or malformed, or the pipeline is of another kind.
    """
    index, replaced = read(folder, INDEX), replaced or {}
    kind = index.get("_class_name")
    if kind not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        raise UserError(
            f"File {folder / INDEX} describes a {kind!r}; "
            "only StableDiffusionPipeline and StableDiffusionXLPipeline folders are supported."
        )
    folders = {part: folder / part for part in PARTS if part != "text_encoder_2" or is_xl(index)}
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


def is_xl(index: Json) -> bool:
    """Whether a ``model_index.json`` is that of SDXL."""
    return index.get("_class_name") == "StableDiffusionXLPipeline"


def tokenizer_of(part: str) -> str | None:
    """The name of the tokenizer that goes with a part: "tokenizer" or "tokenizer_2"; None for no text encoder."""
    return part.replace("text_encoder", "tokenizer") if part.startswith("text_encoder") else None


def write_configs(files: PipelineFiles, folder: Path) -> None:
    """Writes a diffusers folder of the pipeline that lacks nothing but weights."""
    classes = {part: [PARTS[part].library, PARTS[part].model.__name__] for part in files.configs}
    classes |= {name: ["transformers", "CLIPTokenizer"] for name in files.tokenizers}
    classes["scheduler"] = ["diffusers", files.scheduler["_class_name"]]
    settings = {name: value for name, value in files.index.items() if not isinstance(value, list)}
    index = {**settings, **classes, **_NO_PARTS}
    if not files.is_xl:
        index["requires_safety_checker"] = False
    written = {INDEX: index, SCHEDULER: files.scheduler}
    for name, value in {**written, **{f"{part}/config.json": config for part, config in files.configs.items()}}.items():
        write_text(folder / name, json.dumps(value, indent=2) + "\n")
    for name, source in files.tokenizers.items():
        shutil.copytree(resolve_model(source, weights=False), folder / name, copy_function=shutil.copyfile)
