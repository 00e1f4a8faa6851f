"""The chips that a run can be planned for: their memory, and how much they compute at their peak."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
      platform: "tpu" or "cuda".
      memory: bytes; of a TPU those that programs can have, of a GPU all that CUDA reports.
      tflops: TFLOP/s at its peak, by the dtype in which networks compute.
      compiles: whether its programs can be compiled without it. A GPU must be described to its compiler for that, and
        only the description of an h100 is here (``h100.txtpb``).
    """

    platform: str
    memory: int
    tflops: dict[str, float]
    compiles: bool = True


def _tpu(gib: float, tflops: float) -> Chip:
    """By default JAX computes products of float32 in bfloat16 on a TPU."""
    return Chip("tpu", int(gib * GIB), {"bfloat16": tflops, "float32": tflops})


def _gpu(memory: int | float, bfloat16: float, float32: float, *, compiles: bool = False) -> Chip:
    """Tensor cores, dense (without sparsity), sums in float32; and for float32 without tensor cores.

    By default JAX lets products of float32 run on tensor cores in TF32, so where these help it is faster than said.
    """
    return Chip("cuda", int(memory), {"bfloat16": bfloat16, "float32": float32}, compiles)


# Memory of TPUs: what libtpu says is available for programs when one does not fit. Of GPUs: of the h100 and the A100 of
# 40 GB the bytes in XLA's descriptions of them, of the others the least total that users' reports of CUDA's "out of
# memory" show, which depends on driver and error correction (A100 79.15 GiB, L4 22.03, both RTX 23.5 to 23.7).
# Peaks: Google's pages on TPU v5e, v5p and v6e; NVIDIA's data sheets of the H100 (SXM), A100 and L4, with half of what
# they give with sparsity, and for the RTX the appendices of NVIDIA's papers on the GA102 and the Ada architecture,
# "Peak BF16 Tensor TFLOPS with FP32 Accumulate".
CHIPS = {
    "v5e": _tpu(15.75, 197),
    "v6e": _tpu(31.24, 918),
    "v5p": _tpu(95.73, 459),
    "h100": _gpu(85_045_870_592, 989, 67, compiles=True),  # device_memory_size in h100.txtpb
    "a100-80": _gpu(79.15 * GIB, 312, 19.5),
    "a100-40": _gpu(42_298_834_944, 312, 19.5),
    "l4": _gpu(22.03 * GIB, 121, 30.3),
    "rtx4090": _gpu(23.5 * GIB, 165, 82.6),
    "rtx3090": _gpu(23.5 * GIB, 71, 35.6),
}
