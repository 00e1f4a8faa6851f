"""The run of a config with shapes in place of arrays: no weight is read, nothing is fetched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree
from ml_collections import ConfigDict

from spo_jax import methods
from spo_jax.distributed.offload import in_host_memory
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.errors import UserError
from spo_jax.formats.base import Base
from spo_jax.formats.hub import exists, find_file, local, repository_of, with_strength
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.networks import build
from spo_jax.formats.pipeline import Pipeline, described, with_image_size, with_unet
from spo_jax.formats.pipeline_files import open_folder
from spo_jax.formats.remote import is_weight_file
from spo_jax.formats.single_file import open_single_file
from spo_jax.formats.tokenizers import BlankTokenizer
from spo_jax.formats.weights import TRANSFORMERS_STEM, open_file, open_weights
from spo_jax.models import CLIPModel, published
from spo_jax.models.clip import CLIPTextTransformer
from spo_jax.runs.assembly import Assembly, Place, Program, sharded
from spo_jax.runs.state import TrainState
from spo_jax.types import Tokenizer


def placed(shapes: PyTree, place: Place, prefix: tuple[str, ...] = ()) -> PyTree:
    """The same tree of ``jax.ShapeDtypeStruct``, each with its sharding."""

    def one(path, leaf):
        names = (*prefix, *(key.key for key in path))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(names, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, shapes)


def _part_place(part: str, name: str) -> Path:
    """The folder that is named, or its folder of the part's name."""
    inside = Path(name) / part
    return inside if find_file(inside, "config.json") is not None else Path(name)


def _known_config(name: Path, file: str) -> Json:
    """A config of a model that is here, else the published one."""
    if (found := find_file(name, file)) is not None:
        return read_json(found)
    repository, part = repository_of(name) or "", file.partition("/")[0].removesuffix(".json")
    known = published.VAES if file == "config.json" else published.PIPELINES.get(repository, {})
    if (config := known.get(repository if file == "config.json" else part)) is not None:
        return config
    raise UserError(
        f"Model {str(name)!r} has no {file} here, in a folder or in the cache of the hub; give one that is, "
        f"or one whose sizes are known: {', '.join([*published.PIPELINES, *published.VAES])}."
    )


def _has_time_layers(name: str) -> bool:
    """Whether weights have them that are here, by their keys; else a CLIP that is known by its name is a plain one."""
    path = local(name)
    if path.is_file():
        weights = open_file(path)
    elif path.is_dir():
        weights = open_weights(path, TRANSFORMERS_STEM)
    else:
        return repository_of(name) not in published.CLIPS
    return any("t_embedder." in key for key in weights.arrays)


def num_parameters(tree: PyTree) -> int:
    """Parameters in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of sharded arrays or shapes on the device that holds most (all hold the same here).

    What waits in the host's memory (``config.offload``) is not counted.
    """

    def one(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
        if in_host_memory(leaf):
            return 0
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        return item_bytes(leaf.dtype) * math.prod(shape)

    return sum(map(one, jax.tree.leaves(tree)))


def item_bytes(dtype: DTypeLike) -> int:
    """Bytes of one number, or of a random key."""
    return 16 if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else jnp.dtype(dtype).itemsize


def make_run(config: ConfigDict, mesh: Mesh | AbstractMesh) -> Assembly:
    """The run of a config on a mesh, which may be abstract as long as no program is compiled; see ``assemble``."""
    return methods.module_of(config.method, "assemble").assemble(config, mesh, Shapes)


def extra_bytes(program: Program, run: Assembly) -> int:
    """Bytes on a device of the arguments that are not ``run.resident``."""
    there = {id(leaf) for leaf in jax.tree.leaves(run.resident)}
    return device_bytes([leaf for leaf in jax.tree.leaves(program.arguments) if id(leaf) not in there])


class Shapes:
    """See ``assembly.Load``: networks by their configs alone.

    Configs are those of local models and of the hub's cache, or else those of published models, which ship with the
    package.
    """

    def __init__(self, place: Place, dtype: DTypeLike, attention: str = "auto") -> None:
        self._place, self._dtype, self._attention = place, dtype, attention

    def pipeline(self, base: Base, height: int | None, width: int | None, *, remat: bool) -> Pipeline:
        """``jax.ShapeDtypeStruct`` for parameters, and blank tokenizers.

        Raises:
          UserError: there is no config to be found, or it is not supported, or the parts do not fit each other.
        """
        replaced = {part: _part_place(part, name) for part, name in (("unet", base.unet), ("vae", base.vae)) if name}
        if (path := local(base.model)).is_file():
            files = open_single_file(path).with_parts(replaced, _known_config)
        else:
            files = open_folder(Path(base.model), None, replaced, _known_config)
        pipeline = with_image_size(described(files, self._dtype), height, width)
        pipeline = with_unet(pipeline, remat=remat, attention=self._attention)
        return dataclasses.replace(pipeline, params=placed(pipeline.params, self._place))

    def clip(
        self, name: str, part: str, *, params_dtype: DTypeLike | None = None, step_aware: bool | None = None
    ) -> tuple[CLIPModel, PyTree]:
        """A weight file without a ``config.json`` beside it is a ViT-H/14, and so is what is not here and not known:
        every released preference model is one."""
        folder = local(name).parent if is_weight_file(name) else local(name)
        found = find_file(folder, "config.json")
        known = published.CLIPS.get(repository_of(name) or "", published.CLIP_VIT_H)
        config = known if found is None else read_json(found)
        step_aware = _has_time_layers(name) if step_aware is None else step_aware
        where = f"File {folder / 'config.json'}"
        clip, shapes = build(CLIPModel, config, self._dtype, where=where, step_aware=step_aware)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(params_dtype or self._dtype)), shapes)
        return clip.clone(attention=self._attention), placed(shapes, self._place, (part,))

    def tokenizer(self, name: str, default: Tokenizer, tower: CLIPTextTransformer | None) -> Tokenizer:
        """A blank one of the length that the tower takes."""
        return default if tower is None else BlankTokenizer(tower.max_position_embeddings)

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
