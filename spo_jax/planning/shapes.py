"""The models of a config by their shapes alone: no weight is read, nothing is fetched."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.distributed.offload import in_host_memory
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.errors import UserError
from spo_jax.formats import pipeline as reading
from spo_jax.formats.base import Base
from spo_jax.formats.hub import exists, find_file, local, repository_of, with_strength
from spo_jax.formats.parts import check_parts, mended_unet, scheduler_of
from spo_jax.formats.pipeline import Pipeline, read_json
from spo_jax.formats.single_file import open_single_file
from spo_jax.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
    published,
)
from spo_jax.runs.assembly import Place, sharded
from spo_jax.runs.state import TrainState
from spo_jax.types import Tokenizer

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")


def placed(shapes: Any, place: Place, prefix: tuple[str, ...] = ()) -> Any:
    """The same tree of ``jax.ShapeDtypeStruct``, each with its sharding."""

    def one(path, leaf):
        names = (*prefix, *(key.key for key in path))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(names, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, shapes)


def pipeline_shapes(base: Base, dtype: Any, place: Place) -> Pipeline:
    """The pipeline of a config with ``jax.ShapeDtypeStruct`` for parameters and no tokenizers.

    Args:
      base: local folders, or repositories whose configs are in the hub's cache or ship with the package.
      dtype: of the networks.
      place: where each parameter lies, by its path in ``Pipeline.params`` and its shape.

    Raises:
      UserError: there is no config to be found, or it is not supported, or the parts do not fit each other.
    """
    name = base.model
    known = published.PIPELINES.get(repository_of(name) or "", {})
    if (path := local(name)).is_file():
        files = open_single_file(path)
        known = {"model_index": files.index, "scheduler": files.scheduler, **files.configs}
    index = _find_config(name, "model_index.json", known.get("model_index"))
    sdxl = index["_class_name"] == "StableDiffusionXLPipeline"

    def part(folder: str, file: str = "config.json") -> dict[str, Any]:
        return _find_config(name, f"{folder}/{file}", known.get(folder))

    unet_config = _find_part(base.unet, "unet") if base.unet else part("unet")
    vae_config = _find_part(base.vae, "vae", published.VAES.get(repository_of(base.vae) or "")) if base.vae else None
    parts, shapes = {}, {}
    for what, kind, shapes_of, config in (
        ("unet", UNet2DConditionModel, reading.unet_shapes, unet_config),
        ("vae", AutoencoderKL, reading.vae_shapes, vae_config or part("vae")),
        ("text_encoder", CLIPTextModel, reading.text_encoder_shapes, part("text_encoder")),
        ("text_encoder_2", CLIPTextModelWithProjection, reading.text_encoder_shapes, sdxl and part("text_encoder_2")),
    ):
        if config:
            parts[what], shapes[what] = _module(kind, shapes_of, json.dumps(config), dtype, dtype)
    check_parts(Path(name), parts)
    if not sdxl:
        parts["unet"] = mended_unet(parts["unet"], unet_config, Path(base.unet or name) / "unet" / "config.json")
    scheduler = "scheduler/scheduler_config.json"
    return Pipeline(
        folder=Path(name),
        tokenizer=None,
        scheduler_config=scheduler_of(part(*scheduler.split("/")), Path(name) / scheduler, sdxl=sdxl),
        params=placed(shapes, place),
        force_zeros_for_empty_prompt=sdxl and bool(index.get("force_zeros_for_empty_prompt", True)),
        **parts,
    )


def _find_part(name: str, part: str, default: Any = None) -> dict[str, Any]:
    """The config of what replaces a part: in the folder that is named, or in its folder of the part's name."""
    inside = find_file(name, f"{part}/config.json")
    return _find_config(name, "config.json", default if inside is None else read_json(inside))


def clip_shapes(
    name: str,
    dtype: Any,
    place: Place,
    *,
    step_aware: bool,
    what: str,
    params_dtype: Any = None,
    known_plain: bool = True,
) -> tuple[CLIPModel, Any]:
    """A CLIP and the shapes of its parameters.

    Args:
      name: as in ``config.scorer.path``. A weight file without a ``config.json`` beside it is a ViT-H/14, and so is
        what is not here and not known: every released preference model is one.
      dtype: of the network.
      place: where each parameter lies.
      step_aware: whether it has time layers (what training reads from the weights). A plain CLIP that is known by its
        name has none.
      what: its name in the parameters of a program, with which its paths begin.
      params_dtype: of its parameters, if another.
      known_plain: False gives time layers even to one that is known to have none, as training from it does.
    """
    path = local(name)
    folder = path.parent if path.suffix in WEIGHT_SUFFIXES else path
    config = _find_config(folder, "config.json", published.CLIPS.get(repository_of(name) or "", published.CLIP_VIT_H))
    step_aware = step_aware and not (known_plain and repository_of(name) in published.CLIPS)
    params_dtype = dtype if params_dtype is None else params_dtype
    clip, shapes = _module(
        CLIPModel, reading.clip_shapes, json.dumps(config), dtype, params_dtype, step_aware=step_aware
    )
    return clip, placed(shapes, place, (what,))


@functools.lru_cache(maxsize=16)  # seconds of tracing, asked for again by each estimate
def _module(kind: Any, shapes_of: Any, config: str, dtype: Any, params_dtype: Any, **options: Any) -> tuple[Any, Any]:
    """A network of a config, as JSON, and the shapes of its parameters."""
    module = kind.from_config(json.loads(config), dtype=dtype, **options)
    return module, shapes_of(module, params_dtype)


def num_parameters(tree: Any) -> int:
    """Parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded arrays or shapes on the device that holds most (all hold the same here).

    What waits in the host's memory (``config.offload``) is not counted.
    """

    def one(leaf: Any) -> int:
        if in_host_memory(leaf):
            return 0
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return 16 * leaf.size  # random keys
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        return int(jnp.dtype(leaf.dtype).itemsize) * math.prod(shape)

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


def _find_config(name: str | Path, file: str, default: Any = None) -> dict[str, Any]:
    """A config of a model that is here; else the default, from the published ones."""
    found = find_file(name, file)
    if found is not None:
        return read_json(found)
    if default is None:
        known = ", ".join([*published.PIPELINES, *published.VAES])
        raise UserError(
            f"Model {str(name)!r} has no {file} here, in a folder or in the cache of the hub; give one that is, "
            f"or one whose sizes are known: {known}."
        )
    return default


class BlankTokenizer:
    """Stands for a tokenizer where only shapes count."""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, texts: list[str], **_options: object) -> dict[str, np.ndarray]:
        return {"input_ids": np.zeros((len(texts), self.model_max_length), np.int32)}


class Shapes:
    """See ``assembly.Load``: networks by their configs alone."""

    def pipeline(self, base: Base, dtype: DTypeLike, place: Place) -> Pipeline:
        """``pipeline_shapes``, with blank tokenizers of the lengths that the text encoders take."""
        pipeline = pipeline_shapes(base, dtype, place)
        first, second = pipeline.text_encoder, pipeline.text_encoder_2
        return dataclasses.replace(
            pipeline,
            tokenizer=BlankTokenizer(first.config.get("max_position_embeddings", 77)),
            tokenizer_2=None if second is None else BlankTokenizer(second.config.get("max_position_embeddings", 77)),
        )

    def clip(
        self,
        name: str,
        part: str,
        place: Place,
        *,
        dtype: DTypeLike,
        params_dtype: DTypeLike | None = None,
        step_aware: bool | None = None,
    ) -> tuple[CLIPModel, PyTree]:
        """``clip_shapes``; where the weights would tell, only a CLIP that is known by its name is taken as plain."""
        options = {"step_aware": step_aware is not False, "known_plain": step_aware is None}
        return clip_shapes(name, dtype, place, what=part, params_dtype=params_dtype, **options)

    def tokenizer(self, name: str, default: Tokenizer) -> Tokenizer:
        """The default, which is blank."""
        return default

    def prompts(self, name: str, limit: int | None = None) -> list[str]:
        """Blank ones, as many as there may be."""
        return [""] * (limit or 1)

    def adapters(self, name: str) -> str:
        """None where they are not here: mostly the shapes are those of fresh adapters."""
        return name if exists(with_strength(name)[0]) else ""

    def state(self, make: Callable[[PyTree], TrainState], params: PyTree, mesh: Mesh) -> TrainState:
        """Shapes of the state."""
        state = jax.eval_shape(make, params)
        return sharded(state, weight_shardings(mesh, state))
