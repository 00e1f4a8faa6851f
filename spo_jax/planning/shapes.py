"""The models of a config by their shapes alone: no weight is read, nothing is fetched."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.distributed.offload import in_host_memory
from spo_jax.distributed.sharding import weight_shardings
from spo_jax.errors import UserError
from spo_jax.formats.base import Base
from spo_jax.formats.hub import exists, find_file, local, repository_of, with_strength
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.networks import build
from spo_jax.formats.pipeline import Pipeline, described, for_run
from spo_jax.formats.pipeline_files import open_folder
from spo_jax.formats.remote import is_weight_file
from spo_jax.formats.single_file import open_single_file
from spo_jax.formats.tokenizers import BlankTokenizer
from spo_jax.models import CLIPModel, published
from spo_jax.models.clip import CLIPTextTransformer
from spo_jax.runs.assembly import Place, sharded
from spo_jax.runs.state import TrainState
from spo_jax.types import Tokenizer


def placed(shapes: PyTree, place: Place, prefix: tuple[str, ...] = ()) -> PyTree:
    """The same tree of ``jax.ShapeDtypeStruct``, each with its sharding."""

    def one(path, leaf):
        names = (*prefix, *(key.key for key in path))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(names, leaf.shape))

    return jax.tree_util.tree_map_with_path(one, shapes)


def pipeline_shapes(
    base: Base,
    dtype: DTypeLike,
    place: Place,
    *,
    height: int | None = None,
    width: int | None = None,
    remat: bool = False,
) -> Pipeline:
    """What ``read_base`` gives, with ``jax.ShapeDtypeStruct`` for parameters and blank tokenizers.

    Configs are those of local models and of the hub's cache, or else those of published models, which ship with the
    package. ``place`` tells where each parameter lies, by its path in ``Pipeline.params`` and its shape.

    Raises:
      UserError: there is no config to be found, or it is not supported, or the parts do not fit each other.
    """
    replaced = {part: _part_place(part, name) for part, name in (("unet", base.unet), ("vae", base.vae)) if name}
    if (path := local(base.model)).is_file():
        files = open_single_file(path).with_parts(replaced, _known_config)
    else:
        files = open_folder(Path(base.model), None, replaced, _known_config)
    pipeline = for_run(described(files, dtype), height=height, width=width, remat=remat)
    return dataclasses.replace(pipeline, params=placed(pipeline.params, place))


def _part_place(part: str, name: str) -> Path:
    """The folder that is named, or its folder of the part's name."""
    inside = Path(name) / part
    return inside if find_file(inside, "config.json") is not None else Path(name)


def _known_config(name: Path, file: str) -> Json:
    """A config of a model that is here, else the published one."""
    repository = repository_of(name) or ""
    if file == "config.json":
        return _config(name, file, published.VAES.get(repository))
    part = file.partition("/")[0].removesuffix(".json")
    return _config(name, file, published.PIPELINES.get(repository, {}).get(part))


def _config(name: Path, file: str, default: Json | None) -> Json:
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


def clip_shapes(
    name: str,
    dtype: DTypeLike,
    place: Place,
    *,
    step_aware: bool,
    what: str,
    params_dtype: DTypeLike | None = None,
    known_plain: bool = True,
) -> tuple[CLIPModel, PyTree]:
    """A CLIP and the shapes of its parameters.

    Args:
      name: as in ``config.scorer.path``. A weight file without a ``config.json`` beside it is a ViT-H/14, and so is
        what is not here and not known: every released preference model is one.
      dtype: of the network.
      place: where each parameter lies.
      step_aware: whether it has time layers; a plain CLIP that is known by its name has none.
      what: its name in the parameters of a program, with which its paths begin.
      params_dtype: of its parameters, if another.
      known_plain: False gives time layers even to one that is known to have none, as training from it does.
    """
    path, repository = local(name), repository_of(name) or ""
    folder = path.parent if is_weight_file(name) else path
    config = _config(folder, "config.json", published.CLIPS.get(repository, published.CLIP_VIT_H))
    step_aware = step_aware and not (known_plain and repository in published.CLIPS)
    where = f"File {folder / 'config.json'}"
    clip, shapes = build(CLIPModel, config, dtype, params_dtype, where=where, step_aware=step_aware)
    return clip, placed(shapes, place, (what,))


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
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return 16 * leaf.size  # random keys
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        return int(jnp.dtype(leaf.dtype).itemsize) * math.prod(shape)

    return sum(one(leaf) for leaf in jax.tree.leaves(tree))


class Shapes:
    """See ``assembly.Load``: networks by their configs alone."""

    def pipeline(self, base: Base, dtype: DTypeLike, place: Place) -> Pipeline:
        """See ``pipeline_shapes``."""
        return pipeline_shapes(base, dtype, place)

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
