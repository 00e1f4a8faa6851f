"""Hardware that need not be there: its devices for the compiler, and what one of them holds."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax

from spo_jax.errors import UserError

GIB = 2**30
# What libtpu says is available for programs when one does not fit.
_TPU_GIB = {"v5e": 15.75, "v6e": 31.24, "v5p": 95.73}
# JAX takes this part of a GPU's memory for itself when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says another.
_GPU_FRACTION = 0.75
_H100_BYTES = 85_045_870_592
_H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {_H100_BYTES}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""
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
    """So many devices of one kind.

    Attributes:
      name: as the user writes it, such as "v5e:2x4", "h100:8" or "cpu".
      platform: "tpu", "cuda" or "cpu".
      num_devices: how many.
      limit: bytes that programs can have on one; None if there is no fixed number (cpu).
      topology: as the compiler names it.
    """

    name: str
    platform: str
    num_devices: int
    limit: int | None
    topology: str = ""


def parse_target(text: str, memory: float | None = None) -> Target:
    """The target that ``--target`` names.

    Args:
      text: as the user writes it.
      memory: GiB of a GPU that is not an h100, for an estimate.

    Raises:
      UserError: it names none, or a topology that its devices are not built in; or ``memory`` is not of a GPU.
    """
    if memory is not None and not text.startswith("h100"):
        raise UserError(f"--memory={memory:g} is for GPUs, with --target=h100; --target={text} has what it has.")
    kind, _, size = text.partition(":")
    if kind in _TPU_GIB and re.fullmatch(r"\d+(x\d+)*|", size):
        one, example = ("1x1x1", "v5p:2x2x1") if kind == "v5p" else ("1x1", f"{kind}:2x4")
        dimensions = [int(n) for n in (size or one).split("x")]
        if len(dimensions) != len(one.split("x")) or 0 in dimensions:
            raise UserError(f"--target={text} is no topology of {kind} devices; write it as {example}.")
        return Target(text, "tpu", math.prod(dimensions), int(_TPU_GIB[kind] * GIB), f"{kind}:{size or one}")
    if kind in ("h100", "cpu") and re.fullmatch(r"[1-9]\d*|", size):
        count = int(size or 1)
        if kind == "cpu":
            return Target(text, "cpu", count, None)
        fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _GPU_FRACTION))
        limit = int((_H100_BYTES if memory is None else memory * GIB) * fraction)
        return Target(text, "cuda", count, limit, f"1x1x{count}")
    raise UserError(
        f"--target={text} is not known; use v5e, v6e or v5p with a topology (v5e:2x4, v5p:2x2x1), h100, h100:8, or cpu."
    )


def check_installed(target: Target) -> None:
    """Raises UserError if the compiler of a target is not installed."""
    package = {"tpu": "libtpu", "cuda": "jax_cuda12_plugin", "cpu": "jax"}[target.platform]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"--target={target.name} needs its compiler to be exact (Python package {package}); install it with "
            "`pip install -r requirements-plan.txt`, or ask with --estimate."
        )


def devices_of(target: Target) -> list[jax.Device]:
    """The devices of a target, for the compiler; ``ENVIRONMENT`` must be set.

    Raises:
      UserError: the compiler is not installed, or does not know the topology.
    """
    check_installed(target)
    if target.platform == "cpu":
        return jax.devices("cpu")[: target.num_devices]
    from jax.experimental import topologies

    gpu = {"topology": target.topology, "target_config": _H100}
    options = gpu | {"topology_name": "h100"} if target.platform == "cuda" else {"topology_name": target.topology}
    try:
        return list(topologies.get_topology_desc(platform=target.platform, **options).devices)
    except Exception as error:  # of the plugin, which has no class of its own for it
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--target={target.name} is refused by its compiler ({reason}); use another topology."
        ) from error
