"""Memory of a run without compiling: what stays by its shapes, what a program needs by a walk over its jaxpr."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from spo_jax.distributed.mesh import AXES, make_mesh, mesh_sizes, round_up
from spo_jax.planning.programs import extra_bytes, make_run
from spo_jax.planning.shapes import device_bytes
from spo_jax.planning.targets import Target
from spo_jax.planning.walk import walk
from spo_jax.runs.assembly import Assembly

# Programs whose batch is not split over the devices: each device does all of it.
_WHOLE = ("encode",)
# Keys that do not matter for a program.
_UNREAD = {
    "pool": ("train", "remat", "evaluation"),
    "score": ("train", "remat", "evaluation"),
    "encode": ("train", "remat", "evaluation", "scorer.chunk"),
    "exchange": ("remat", "scorer.chunk", "evaluation"),
    "update": ("prompts_per_batch", "scorer.chunk", "evaluation", "train.accumulation_steps"),
    "evaluation": ("prompts_per_batch", "train", "remat"),
}
# A TPU's programs lie in its memory, what they do in several places once. Seen: 0.15 GiB (evaluation of SD1.5) to 1.1
# (that of SDXL), and nothing that tells which.
_CODE_BYTES, _MOST_CODE = 400_000, 2**30
# Compilers keep more than they must, for speed. Seen: 0.9 to 2.5 times what the walk finds, mostly 1.2 to 1.6; this is
# what brings the programs of docs/memory.md without mesh.fsdp within 15 % of all of their memory.
_KEPT = 1.2
# With mesh.fsdp a TPU's compiler gathers weights where they are used, some before they are, and copies the parts that
# loops read. Seen, as a part of those weights whole: pools 0.4 to 0.6, evaluations 0.5 to 1.1, updates -0.2 to 0.5.
_GATHERED = {"pool": 0.6, "update": 0.2}
_GATHERED_ELSE = 0.7
_known: dict[str, tuple[float, int, int, list[int]]] = {}


def abstract_run(config: ConfigDict, target: Target) -> Assembly:
    """The run on the target's mesh, for the sizes of what is resident; its programs cannot be made."""
    sizes = mesh_sizes(config.mesh.data, config.mesh.fsdp, target.num_devices)
    return make_run(config, AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES)))


def share_of(config: ConfigDict, num_devices: int) -> ConfigDict:
    """The config of one device's share of the batches, on one device."""
    share = config.copy_and_resolve_references()
    with share.unlocked():
        share.mesh.data = share.mesh.fsdp = 1
        if config.method == "spo":
            share.prompts_per_batch = max(1, config.prompts_per_batch // num_devices)
            share.train.minibatch_size = max(1, config.train.minibatch_size // num_devices)
            pictures = min(config.evaluation.batch_size, config.evaluation.num_prompts)
            share.evaluation.batch_size = round_up(pictures, num_devices) // num_devices
        else:
            share.train.batch_size = max(1, config.train.batch_size // num_devices)
            share.validation.batch_size = max(1, config.validation.batch_size // num_devices)
            share.chunk = config.chunk // num_devices
    return share


def estimate_program(config: ConfigDict, target: Target, name: str) -> tuple[float, int, int]:
    """FLOPs of a program on one device, bytes of its own arguments, and bytes of its own arrays at their peak."""
    share = share_of(config, target.num_devices)
    if name in _WHOLE:
        share = share_of(config, 1)
    _, fsdp = mesh_sizes(config.mesh.data, config.mesh.fsdp, target.num_devices)
    parts = fsdp if name == "update" else 1
    what = [target.platform, target.num_devices, parts, name, _read_keys(share, name)]
    key = json.dumps(what, sort_keys=True, default=str)
    if key not in _known:
        run = _run_of(share.to_json())
        program = run.programs[name]
        jaxpr = program.function.trace(*program.arguments).jaxpr.jaxpr
        # Without what nobody reads, such as results of a forward pass that is made again for its inner values.
        jaxpr, read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        num_donated = len(jax.tree.leaves(program.arguments[0])) if name == "update" else 0
        size_of = _with_split_gradients(_tiled_bytes if target.platform == "tpu" else _bytes, run, parts)
        cost = walk(jaxpr, size_of, fuses_operands=target.platform == "tpu", num_donated=num_donated)
        own, extra = round(_KEPT * cost.peak), extra_bytes(program, run)
        if target.platform == "tpu":
            own += min(_CODE_BYTES * cost.products, _MOST_CODE)
        if name == "exchange":  # each device goes through the minibatch of all of them
            own *= target.num_devices
        leaves = [leaf for leaf, used in zip(jax.tree.leaves(program.arguments), read, strict=True) if used]
        _known[key] = cost.flops, extra, own, _split_bytes(run, leaves, jnp.dtype(config.dtype).itemsize)
    flops, extra, own, split = _known[key]
    if target.platform == "tpu":
        own += round(_gathered(name, split) * (fsdp - 1) / fsdp)
    return flops, extra, own


def _with_split_gradients(size_of: Callable[[Any], int], run: Assembly, parts: int) -> Callable[[Any], int]:
    """The size on a device: gradients and updates of split weights are split like them, and known by their shapes."""
    split = {
        tuple(sorted(leaf.shape))  # a product or a convolution makes a gradient with its axes in another order
        for leaf in jax.tree.leaves(run.resident["trained"])
        if "fsdp" in tuple(leaf.sharding.spec)
    }
    return lambda aval: size_of(aval) // (parts if tuple(sorted(aval.shape)) in split else 1)


def _gathered(name: str, split: list[int]) -> float:
    """Bytes of split weights that are whole at a time on a TPU, of those of each network, whole.

    The pool's steps sample and score in one loop, the other programs use one network after the other. A GPU's compiler
    gathers each weight where it is used, and lets it go.
    """
    return _GATHERED.get(name, _GATHERED_ELSE) * (sum(split) if name == "pool" else max(split))


def _split_bytes(run: Assembly, leaves: list[Any], itemsize: int) -> list[int]:
    """Bytes, in the dtype of the network, of those weights among ``leaves`` that ``mesh.fsdp`` splits, by network."""
    split = {id(leaf) for leaf in leaves if "fsdp" in tuple(leaf.sharding.spec)}
    return [
        sum(leaf.size * min(leaf.dtype.itemsize, itemsize) for leaf in jax.tree.leaves(tree) if id(leaf) in split)
        for name, tree in run.resident.items()
        if name not in ("optimizer", "average", "texts")
    ]


@functools.lru_cache(maxsize=2)  # one device's share, and the whole batch
def _run_of(config: str) -> Assembly:
    return make_run(ConfigDict(json.loads(config)), make_mesh(1, 1, jax.devices()[:1]))


def resident_bytes(run: Assembly) -> dict[str, int]:
    """Bytes on a device of what is there all the time, by what it is."""
    return {name: device_bytes(tree) for name, tree in run.resident.items()}


def _read_keys(config: ConfigDict, name: str) -> dict[str, Any]:
    values = config.to_dict()
    for key in _UNREAD.get(name, ()) if config.method == "spo" else ():
        *path, last = key.split(".")
        inner = values
        for part in path:
            inner = inner[part]
        inner.pop(last, None)
    return values


def _bytes(aval: Any) -> int:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return 16 * aval.size  # a random key
    return aval.size * aval.dtype.itemsize


def _tiled_bytes(aval: Any) -> int:
    """With the padding of a TPU, whose arrays are made of tiles of 8 x 128.

    Feature maps of convolutions have channels and batch in their tiles, if there is a batch; of everything else
    the compiler is taken to choose the two dimensions that waste the least.
    """

    def padded(rows: int, columns: int) -> int:
        return -(-rows // 8) * 8 * (-(-columns // 128)) * 128

    if aval.ndim < 2 or _bytes(aval) < 2**16 or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return _bytes(aval)
    shape = aval.shape
    if aval.ndim == 4 and shape[0] > 1 and shape[3] >= 64:
        return padded(shape[0], shape[3]) * shape[1] * shape[2] * aval.dtype.itemsize
    least = min(
        math.prod(shape) // max(1, rows * columns) * padded(rows, columns)
        for i, rows in enumerate(shape)
        for j, columns in enumerate(shape)
        if i != j
    )
    return least * aval.dtype.itemsize
