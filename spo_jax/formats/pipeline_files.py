"""The files of a pipeline, opened but not read: configs, tokenizers, weights. A folder or a single file has them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spo_jax.errors import UserError
from spo_jax.files import write_text
from spo_jax.formats.hub import resolve_model
from spo_jax.formats.pipeline import choose_variants, read_json, text_encoder_shapes, unet_shapes, vae_shapes
from spo_jax.formats.weights import DIFFUSERS_STEM, TRANSFORMERS_STEM, Placement, Weights, open_weights, read_params
from spo_jax.models import AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel

_MODELS: dict[str, tuple[Any, Callable[..., Any], str, str]] = {
    "unet": (UNet2DConditionModel, unet_shapes, "diffusers", DIFFUSERS_STEM),
    "vae": (AutoencoderKL, vae_shapes, "diffusers", DIFFUSERS_STEM),
    "text_encoder": (CLIPTextModel, text_encoder_shapes, "transformers", TRANSFORMERS_STEM),
    "text_encoder_2": (CLIPTextModelWithProjection, text_encoder_shapes, "transformers", TRANSFORMERS_STEM),
}
_NO_PARTS = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}


@dataclasses.dataclass(frozen=True)
class PipelineFiles:
    """A pipeline's files.

    ``configs`` holds the ``config.json`` of each part, by "unet", "vae", "text_encoder" and, for SDXL,
    "text_encoder_2"; ``tokenizers`` a folder or a name of the hub for each text encoder, by "tokenizer" and
    "tokenizer_2". ``find`` gives a part's weights, for its name and the shapes of its parameters.
    """

    path: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    tokenizers: dict[str, str | Path]
    find: Callable[[str, Any], Weights]

    def module(self, part: str, dtype: Any) -> Any:
        """The module of a part; UserError if its config is bad."""
        with self._checked(part):
            return _MODELS[part][0].from_config(self.configs[part], dtype)

    def shapes(self, part: str, dtype: Any) -> Any:
        """Shapes of a part's parameters; UserError if its config is bad."""
        module = self.module(part, dtype)
        with self._checked(part):
            return _MODELS[part][1](module, dtype)

    def read(self, part: str, dtype: Any, *, sharding: Placement = None) -> Any:
        """The parameters of a part; errors as of ``shapes`` and ``read_params``."""
        shapes = self.shapes(part, dtype)
        return read_params(self.find(part, shapes), shapes, sharding=sharding)

    @contextlib.contextmanager
    def _checked(self, part: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"Model {self.path}, {part}: {error}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"Model {self.path}, {part}: its sizes make no model ({reason}).") from error


def open_folder(folder: Path, variant: str | None = None, replaced: Mapping[str, Path] | None = None) -> PipelineFiles:
    """The files of a diffusers pipeline folder.

    Args:
      folder: local.
      variant: of the weight files.
      replaced: folders of parts that are not the pipeline's own.

    Raises:
      UserError: a config is missing or malformed.
    """
    index = read_json(folder / "model_index.json")
    parts = [part for part in _MODELS if part != "text_encoder_2" or is_xl(index)]
    folders = {part: (replaced or {}).get(part, folder / part) for part in parts}
    return PipelineFiles(
        path=folder,
        index=index,
        configs={part: read_json(folders[part] / "config.json") for part in parts},
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        tokenizers={name: folder / name for name in tokenizer_names(parts)},
        find=lambda part, _: open_weights(folders[part], stem_of(part), choose_variants(folders, variant)[part]),
    )


def open_pipeline(path: Path, variant: str | None = None, replaced: Mapping[str, Path] | None = None) -> PipelineFiles:
    """The files of a pipeline, a folder (see ``open_folder``) or a single file."""
    if not path.is_file():
        return open_folder(path, variant, replaced)
    from spo_jax.formats.single_file import open_single_file  # which builds on this module

    return with_parts(open_single_file(path), replaced or {}, variant)


def with_parts(files: PipelineFiles, replaced: Mapping[str, Path], variant: str | None = None) -> PipelineFiles:
    """The files with parts from other folders."""

    def find(part: str, shapes: Any) -> Weights:
        if part not in replaced:
            return files.find(part, shapes)
        return open_weights(replaced[part], stem_of(part), choose_variants(replaced, variant)[part])

    configs = files.configs | {part: read_json(folder / "config.json") for part, folder in replaced.items()}
    return dataclasses.replace(files, configs=configs, find=find)


def is_xl(index: dict[str, Any]) -> bool:
    """Whether a ``model_index.json`` is that of SDXL."""
    return index.get("_class_name") == "StableDiffusionXLPipeline"


def stem_of(part: str) -> str:
    """What the name of a part's weight file begins with."""
    return _MODELS[part][3]


def tokenizer_names(parts: Any) -> list[str]:
    """The tokenizers that go with the text encoders among ``parts``."""
    return [part.replace("text_encoder", "tokenizer") for part in parts if part.startswith("text_encoder")]


def write_configs(files: PipelineFiles, folder: Path) -> None:
    """Writes a diffusers folder of the pipeline that lacks nothing but weights."""
    classes = {part: [_MODELS[part][2], _MODELS[part][0].__name__] for part in files.configs}
    classes |= {name: ["transformers", "CLIPTokenizer"] for name in files.tokenizers}
    classes["scheduler"] = ["diffusers", files.scheduler["_class_name"]]
    settings = {name: value for name, value in files.index.items() if not isinstance(value, list)}
    index = {**settings, **classes, **_NO_PARTS}
    if not is_xl(index):
        index["requires_safety_checker"] = False
    write_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    for part, config in files.configs.items():
        write_text(folder / part / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "scheduler" / "scheduler_config.json", json.dumps(files.scheduler, indent=2) + "\n")
    for name, source in files.tokenizers.items():
        shutil.copytree(resolve_model(source, weights=False), folder / name, copy_function=shutil.copyfile)
