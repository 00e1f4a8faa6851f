"""Hardware that need not be there: its devices for the compiler, and what one of them holds."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from pathlib import Path

import jax

from spo_jax.errors import UserError
from spo_jax.planning.chips import CHIPS, GIB, Chip

# JAX takes this part of a GPU's memory for itself when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another.
_GPU_FRACTION = 0.75
_H100 = Path(__file__).with_name("h100.txtpb")  # as XLA describes one
# Set before the compiler is loaded: no search for a TPU's metadata server, several compilations side by side, and CUDA
# libraries without a driver.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """So many devices of one kind."""

    name: str  # as the user writes it, such as "v5e:2x4", "h100:8" or "cpu"
    platform: str  # "tpu", "cuda" or "cpu"
    num_devices: int
    limit: int | None  # bytes that programs can have on one; None if there is no fixed number (cpu)
    topology: str = ""  # as the compiler names it
    compiles: bool = True  # whether programs can be compiled for it
    chip: Chip | None = None  # None of a CPU, and of a GPU of which only the memory is known


def parse_target(text: str, memory: float | None = None) -> Target:
    """The target that ``--target`` names; ``memory`` are GiB of another GPU than the one named, for an estimate.

    Raises:
      UserError: it names none, or a topology that its devices are not built in; or ``memory`` is not of a GPU.
    """
    kind, _, size = text.partition(":")
    chip = CHIPS.get(kind)
    if memory is not None and (chip is None or chip.platform != "cuda"):
        raise UserError(f"--memory={memory:g} is for GPUs, as with --target=h100; --target={text} has what it has.")
    if chip and chip.platform == "tpu" and re.fullmatch(r"\d+(x\d+)*|", size):
        one, example = ("1x1x1", "v5p:2x2x1") if kind == "v5p" else ("1x1", f"{kind}:2x4")
        dimensions = [int(n) for n in (size or one).split("x")]
        if len(dimensions) != len(one.split("x")) or 0 in dimensions:
            raise UserError(f"--target={text} is no topology of {kind} devices; write it as {example}.")
        return Target(text, "tpu", math.prod(dimensions), chip.memory, f"{kind}:{size or one}", chip=chip)
    if re.fullmatch(r"[1-9]\d*|", size):
        count = int(size or 1)
        if kind == "cpu":
            return Target(text, "cpu", count, None)
        if chip and chip.platform == "cuda":
            fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _GPU_FRACTION))
            limit = int((chip.memory if memory is None else memory * GIB) * fraction)
            known = chip if memory is None else None
            return Target(text, "cuda", count, limit, f"1x1x{count}", chip.compiles, known)
    gpus = ", ".join(name for name, chip in CHIPS.items() if chip.platform == "cuda")
    raise UserError(
        f"--target={text} is not known; use v5e, v6e or v5p with a topology (v5e:2x4, v5p:2x2x1), a GPU ({gpus}) with "
        "a number (h100:8), or cpu."
    )


def check_installed(target: Target) -> None:
    """Raises UserError if programs cannot be compiled for a target, or its compiler is not installed."""
    if not target.compiles:
        raise UserError(
            f"--target={target.name} can only be estimated, because compiling needs a description of the GPU and only "
            "that of an h100 is here; add --estimate, or take --target=h100, whose programs need about as much."
        )
    package = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin", "cpu": "jax"}[target.platform]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--target={target.name} needs its compiler to be exact (Python package {package}); install it with "
            "`pip install -r requirements-plan.txt`, or ask with --estimate."
        )


def devices_of(target: Target) -> list[jax.Device]:
    """The devices of a target, for the compiler; ``ENVIRONMENT`` must be set.

    Raises:
      UserError: see ``check_installed``; or the compiler does not know the topology.
    """
    check_installed(target)
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.num_devices]
    from jax.experimental import topologies

    options = {"topology_name": target.topology}
    if target.platform == "cuda":
        config = _H100.read_text(encoding="utf-8")
        options = {"topology_name": "h100", "topology": target.topology, "target_config": config}
    try:
        return list(topologies.get_topology_desc(platform=target.platform, **options).devices)
    except Exception as error:  # of the plugin, which has no class of its own for it
        said = (
            f"--target={target.name} is refused by its compiler ({str(error).splitlines()[0]}); use another topology."
        )
        raise UserError(said) from error
