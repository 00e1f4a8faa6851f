"""Networks of published sizes with random weights, made on the devices: for speed and memory, not for images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.distributed.sharding import path_names, weight_shardings
from spo_jax.formats.base import Base
from spo_jax.formats.pipeline import Pipeline
from spo_jax.models.clip import CLIPModel
from spo_jax.planning.shapes import Shapes
from spo_jax.runs.state import TrainState


class RandomWeights(Shapes):
    """See ``assembly.Load``: sizes from configs, as for a plan, and arrays instead of shapes."""

    def pipeline(self, base: Base, height: int | None, width: int | None, *, remat: bool) -> Pipeline:
        """A base model; its tokenizers are blank."""
        pipeline = super().pipeline(base, height, width, remat=remat)
        return dataclasses.replace(pipeline, params=drawn(pipeline.params))

    def clip(
        self, name: str, part: str, *, params_dtype: DTypeLike | None = None, step_aware: bool | None = None
    ) -> tuple[CLIPModel, PyTree]:
        """A CLIP."""
        clip, shapes = super().clip(name, part, params_dtype=params_dtype, step_aware=step_aware)
        return clip, drawn(shapes)

    def prompts(self, name: str, limit: int | None = None) -> list[str]:
        """Blank ones, enough for a batch."""
        return [""] * (limit or 64)

    def state(self, make: Callable[[PyTree], TrainState], params: PyTree, mesh: Mesh) -> TrainState:
        """The state, on its devices."""
        state = make(params)
        return jax.device_put(state, weight_shardings(mesh, state))


def drawn(shapes: PyTree) -> PyTree:
    """Arrays where the shapes say: scales one, biases zero, kernels of about unit gain."""

    def one(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        name = path_names(path)[-1]
        if name in ("bias", "scale"):
            return jnp.full(leaf.shape, name == "scale", leaf.dtype)
        fan_in = leaf.size // leaf.shape[-1] if leaf.ndim > 1 else 1
        return (jax.random.normal(key, leaf.shape, jnp.float32) * fan_in**-0.5).astype(leaf.dtype)

    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    # One small program for each shape: one for all weights would need all of them in float32 at a time.
    made = [
        jax.jit(lambda key, path=path, leaf=leaf: one(path, leaf, key), out_shardings=leaf.sharding)(jax.random.key(i))
        for i, (path, leaf) in enumerate(leaves)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), made)
