"""What a method is made of, with weights or with shapes only: training runs it, the plan compiles it.

load ---> pipeline, scorers, tokenizers ---> state, programs
  weights: arrays on their devices               runs/load.py
  shapes:  jax.ShapeDtypeStruct with shardings   planning/shapes.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.distributed.mesh import batch_sharding, replicated
from spo_jax.distributed.offload import in_host_memory
from spo_jax.formats.base import Base
from spo_jax.formats.pipeline import Pipeline
from spo_jax.models.clip import CLIPModel, CLIPTextTransformer
from spo_jax.runs.state import TrainState
from spo_jax.types import Tokenizer

# For programs that compare policy and reference, which have to round alike. XLA may skip roundings to bfloat16 where it
# fuses operations, and it fuses the two differently, because only one of them is differentiated.
SAME_ROUNDING = {"xla_allow_excess_precision": False}

Place = Callable[[tuple[str, ...], tuple[int, ...]], Sharding]  # of a parameter, by its path and shape


class Load(Protocol):
    """Where networks come from, with weights or with shapes; UserError for what is not there or does not fit."""

    def __init__(self, place: Place, dtype: DTypeLike, attention: str = "auto") -> None:
        """``place`` gets the paths of parameters, which begin with their part; networks compute in ``dtype``, and with
        ``attention`` of that kind."""

    def pipeline(self, base: Base, height: int | None, width: int | None, *, remat: bool) -> Pipeline:
        """A base model for images of a size, see ``with_image_size``."""

    def clip(
        self, name: str, part: str, *, params_dtype: DTypeLike | None = None, step_aware: bool | None = None
    ) -> tuple[CLIPModel, PyTree]:
        """A CLIP and its parameters; ``step_aware`` None: as its weights tell."""

    def tokenizer(self, name: str, default: Tokenizer, tower: CLIPTextTransformer | None) -> Tokenizer:
        """A tokenizer by its name, or the default if that is empty, fitted to the text tower that reads its ids."""

    def prompts(self, name: str, limit: int | None = None) -> list[str]:
        """The prompts of a file or data set, at most ``limit`` of them."""

    def adapters(self, name: str) -> str:
        """The name of adapters to start from, which are checked; empty where they are not to be read."""

    def state(self, make: Callable[[PyTree], TrainState], params: PyTree, mesh: Mesh) -> TrainState:
        """The state that ``make`` makes of parameters, on its devices."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run.

    Attributes:
      name: what it does, such as "update".
      function: compiled by ``jax.jit``.
      shapes: makes the shapes of its arguments, with shardings; to trace them may take seconds.
    """

    name: str
    function: jax.stages.Wrapped
    shapes: Callable[[], tuple[PyTree, ...]]

    def __call__(self, *args: PyTree) -> PyTree:
        """Runs it."""
        return self.function(*args)

    @functools.cached_property
    def arguments(self) -> tuple[PyTree, ...]:
        """Trees of ``jax.ShapeDtypeStruct`` with shardings."""
        return self.shapes()

    @functools.cached_property
    def results(self) -> PyTree:
        """Shapes of what it returns, without shardings."""
        return jax.eval_shape(self.function, *self.arguments)


class Assembly(Protocol):
    """What a run keeps on its devices and what it computes there; each method has its own."""

    @property
    def resident(self) -> Mapping[str, PyTree]:
        """Trees of arrays or shapes that are there all the time, by what they are: parameters, state, texts."""

    @property
    def programs(self) -> Mapping[str, Program]:
        """By name, in the order in which they run."""

    @property
    def executions(self) -> Mapping[str, int]:
        """How often a whole run executes each program, at most: some do less work if less is there to learn from."""


# ------------------------------------------------------------------------------------------------------------- shapes
def shapes_of(tree: PyTree) -> PyTree:
    """Shapes of arrays, with their shardings; shapes stay the same objects."""

    def one(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(one, tree)


def sharded(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes with the given shardings: a tree of them, or one for all."""
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def on_all(mesh: Mesh, tree: PyTree) -> PyTree:
    """Shapes of what every device has whole."""
    return sharded(tree, replicated(mesh))


def split(mesh: Mesh, tree: PyTree, axis: int = 0) -> PyTree:
    """Shapes of what is split over the devices along an axis."""
    return sharded(tree, batch_sharding(mesh, axis))


def on_device(tree: PyTree) -> PyTree:
    """The shapes of a tree in the memory of devices; those that are there already are the same objects."""

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        there = leaf.sharding.with_memory_kind("device")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there) if in_host_memory(leaf) else leaf

    return jax.tree.map(one, shapes_of(tree))


def key_shape(mesh: Mesh) -> PyTree:
    """The shape of a random key."""
    return on_all(mesh, jax.eval_shape(lambda: jax.random.key(0)))
