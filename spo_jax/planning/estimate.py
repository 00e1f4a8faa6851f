"""Memory of a run without compiling: what stays by its shapes, what a program needs by a walk over its jaxpr.

The estimate is within 20 % of what the compiler needs.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from spo_jax import methods
from spo_jax.distributed.mesh import AXES, make_mesh, mesh_sizes, round_up
from spo_jax.planning.shapes import device_bytes, extra_bytes, item_bytes, make_run
from spo_jax.planning.targets import Target
from spo_jax.planning.walk import Aval, SizeOf, walk
from spo_jax.runs.assembly import Assembly
from spo_jax.runs.config import value_of

# These were fitted to the programs of docs/memory.md (benchmarks/memory_table.json), compiled with jax 0.10.2 and
# libtpu 0.0.52, and are frozen: a better fit to those would not be a better estimate of others.
KEPT = 1.2  # of what the walk finds: compilers keep more than they must, for speed (seen: 0.9 to 2.5)
CODE_BYTES = 400_000  # of a TPU's program for each matrix product or convolution in its text
MOST_CODE = 2**30  # of a TPU's program (seen: 0.15 to 1.1 GiB)


class _Habit(NamedTuple):
    """What an estimate must know of a program beside its jaxpr."""

    unread: tuple[str, ...] = ()  # keys of SPO's config that change nothing in it: a search need not trace it again
    whole: bool = False  # its batch is not split over the devices; each device does all of it
    all_rows: bool = False  # each device goes through the rows of all devices
    gathered: float = 0.7  # with mesh.fsdp, the part of the split weights that a TPU has whole at a time (fitted)


_HABITS = {
    "encode": _Habit(("train", "remat", "evaluation", "scorer.chunk"), whole=True),
    "metric texts": _Habit(("train", "remat", "scorer.chunk"), whole=True),
    "pool": _Habit(("train", "remat", "evaluation"), gathered=0.6),
    "score": _Habit(("train", "remat", "evaluation"), gathered=0.6),
    "arrange": _Habit(("remat", "scorer.chunk", "evaluation"), whole=True),
    "exchange": _Habit(("remat", "scorer.chunk", "evaluation"), all_rows=True),
    "update": _Habit(("prompts_per_batch", "scorer.chunk", "evaluation", "train.accumulation_steps"), gathered=0.2),
    "evaluation": _Habit(("prompts_per_batch", "train", "remat")),
}


class _Traced(NamedTuple):
    """What one trace of a program tells."""

    flops: float
    extra: int  # bytes of arguments that are not resident
    own: int  # bytes of its own arrays at their peak
    split: list[int]  # bytes of split weights by network


_known: dict[str, _Traced] = {}


def abstract_run(config: ConfigDict, target: Target) -> Assembly:
    """The run on the target's mesh, for the sizes of what is resident; its programs cannot be made."""
    sizes = mesh_sizes(config.mesh.data, config.mesh.fsdp, target.num_devices)
    return make_run(config, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def resident_bytes(run: Assembly) -> dict[str, int]:
    """Bytes on a device of what is there all the time, by what it is."""
    return {name: device_bytes(tree) for name, tree in run.resident.items()}


def batches(config: ConfigDict) -> dict[str, int]:
    """The sizes that all devices share, by their keys; 0 is no limit."""
    return {key: value_of(config, key) for key in methods.module_of(config.method, "config").BATCHES}


def share_of(config: ConfigDict, num_devices: int) -> ConfigDict:
    """The config of one device's share of the batches, on one device."""
    share = config.copy_and_resolve_references()
    with share.unlocked():
        share.mesh.data = share.mesh.fsdp = 1
        for key, size in batches(config).items():
            share.update_from_flattened_dict({key: max(1, size // num_devices) if size else 0})
        if "evaluation" in config:
            images = min(config.evaluation.batch_size, config.evaluation.num_prompts)
            share.evaluation.batch_size = round_up(images, num_devices) // num_devices
    return share


def estimate_program(config: ConfigDict, target: Target, name: str) -> tuple[float, int, int]:
    """FLOPs of a program on one device, bytes of its own arguments, and bytes of its own arrays at their peak."""
    habit = _HABITS.get(name, _Habit())
    share = share_of(config, 1 if habit.whole else target.num_devices)
    _, fsdp = mesh_sizes(config.mesh.data, config.mesh.fsdp, target.num_devices)
    read = share.to_dict()
    for key in habit.unread if config.method == "spo" else ():
        *path, last = key.split(".")
        functools.reduce(dict.__getitem__, path, read).pop(last, None)
    key = json.dumps([name, target.platform, fsdp, read], sort_keys=True, default=str)
    if key not in _known:
        _known[key] = _trace(share, name, target.platform, fsdp)
    flops, extra, own, split = _known[key]
    if habit.all_rows:
        own *= target.num_devices
    if target.platform == "tpu":
        # A TPU's compiler gathers some split weights before they are used, and copies the parts that loops read. Scores
        # are made by decoder and scorer in one loop, other programs use one network after the other. A GPU's compiler
        # gathers each weight where it is used, and frees it.
        whole = sum(split) if name == "score" else max(split)
        own += round(habit.gathered * whole * (fsdp - 1) / fsdp)
    return flops, extra, own


def _trace(share: ConfigDict, name: str, platform: str, fsdp: int) -> _Traced:
    run = _run_of(share.to_json())
    program = run.programs[name]
    traced = program.function.trace(*program.arguments)
    # Without what nobody reads, such as results of a forward pass that is repeated for its inner values.
    jaxpr, used = partial_eval.dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.jaxpr.outvars))
    num_donated = sum(argument.donated for argument in jax.tree.leaves(traced.args_info))
    size_of: SizeOf = _tiled_bytes if platform == "tpu" else _bytes
    if num_donated:
        size_of = _with_split_gradients(size_of, run, fsdp)
    cost = walk(jaxpr, size_of, fuses_operands=platform == "tpu", num_donated=num_donated)
    own = round(KEPT * cost.peak) + (min(CODE_BYTES * cost.products, MOST_CODE) if platform == "tpu" else 0)
    leaves = [leaf for leaf, one in zip(jax.tree.leaves(program.arguments), used, strict=True) if one]
    split = _split_bytes(run, leaves, jnp.dtype(share.dtype).itemsize)
    return _Traced(cost.flops, extra_bytes(program, run), own, split)


@functools.lru_cache(maxsize=2)  # one device's share, and the whole batch
def _run_of(config: str) -> Assembly:
    return make_run(ConfigDict(json.loads(config)), make_mesh(1, 1, jax.devices()[:1]))


def _is_split(leaf: jax.ShapeDtypeStruct) -> bool:
    return "fsdp" in tuple(leaf.sharding.spec)


def _with_split_gradients(size_of: SizeOf, run: Assembly, fsdp: int) -> SizeOf:
    """The size on a device: gradients and updates of split weights are split like them, and known by their shapes."""
    # A product or a convolution makes a gradient with its axes in another order.
    split = {tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(run.resident["trained"]) if _is_split(leaf)}
    return lambda aval: size_of(aval) // (fsdp if tuple(sorted(aval.shape)) in split else 1)


def _split_bytes(run: Assembly, leaves: Sequence[jax.ShapeDtypeStruct], itemsize: int) -> list[int]:
    """Bytes, in the dtype of the network, of those weights among ``leaves`` that ``mesh.fsdp`` splits, by network."""
    split = {id(leaf) for leaf in leaves if _is_split(leaf)}
    return [
        sum(leaf.size * min(leaf.dtype.itemsize, itemsize) for leaf in jax.tree.leaves(tree) if id(leaf) in split)
        for name, tree in run.resident.items()
        if name not in ("optimizer", "average", "texts")
    ]


def _bytes(aval: Aval) -> int:
    return aval.size * item_bytes(aval.dtype)


def _tiled_bytes(aval: Aval) -> int:
    """With the padding of a TPU, whose arrays are made of tiles of 8 x 128.

    Feature maps of convolutions have channels and batch in their tiles, if there is a batch. For everything else the
    compiler is assumed to choose the two dimensions that waste the least.
    """

    def padded(rows: int, columns: int) -> int:
        return round_up(rows, 8) * round_up(columns, 128)

    size, shape = _bytes(aval), aval.shape
    if len(shape) < 2 or size < 2**16 or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return size
    if len(shape) == 4 and shape[0] > 1 and shape[3] >= 64:
        return padded(shape[0], shape[3]) * shape[1] * shape[2] * aval.dtype.itemsize
    pairs = itertools.permutations(shape, 2)
    least = min(math.prod(shape) // max(1, rows * columns) * padded(rows, columns) for rows, columns in pairs)
    return least * aval.dtype.itemsize
