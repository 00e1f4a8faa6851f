"""Scaled dot-product attention: which kind computes it is decided here, by platform, dtype, head size and lengths.

    xla      any platform   XLA's own operations, some of the work at a time          kernels/xla.py
    cudnn    NVIDIA GPUs    cuDNN's fused kernels, in bfloat16, from Ampere on        kernels/cudnn.py
    splash   TPUs           JAX's Pallas kernel                                       kernels/splash.py

``config.attention`` names one, or "auto". What a kind cannot compute (a mask, a large head) is left to ``xla``.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from spo_jax.distributed.mesh import AXES
from spo_jax.errors import UserError
from spo_jax.kernels import cudnn, splash, xla

KINDS = ("auto", "xla", "cudnn", "splash")
_PLATFORMS = {"cudnn": "cuda", "splash": "tpu"}
_AMPERE = (8, 0)  # the first compute capability that cuDNN's fused attention runs on
# Fewer logits a sample are computed at once, without a backward pass of our own.
SMALL_LOGITS = 2**16
# Shorter sequences are left to XLA on a TPU, which fuses their softmax.
_SPLASH_QUERIES = 1024


def multi_head_attention(
    query: Float[Array, "b q c"],
    key: Float[Array, "b k c"],
    value: Float[Array, "b k c"],
    num_heads: int,
    mask: Bool[Array, "#b 1 #q k"] | None = None,
    kind: str = "auto",
) -> Float[Array, "b q c"]:
    """Attention of several heads with a float32 softmax; ``kind`` is one of ``KINDS``.

    ``mask`` is false where a query does not see a key; one for all samples, or for all queries, has the length 1 there.

    The platform is that of the mesh that ``jit_on`` compiles for, or else of this machine's devices.
    """
    query, key, value = (x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads) for x in (query, key, value))
    out = _attend(query, key, value, mask, kind)
    return out.reshape(*out.shape[:2], -1)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, kind: str) -> jax.Array:
    """[B, L, h, d] each."""
    batch, queries, heads, head_size = query.shape
    mesh = jax.sharding.get_abstract_mesh()
    platform, chip = _device()
    if mask is None:
        kind = choose(kind, platform, query.dtype, head_size, queries)
        if kind != "xla":
            kernel = cudnn.attend if kind == "cudnn" else functools.partial(splash.attend, chip=chip)
            if mesh.size > 1 and set(mesh.axis_names) == set(AXES) and batch % mesh.size == 0:
                # A kernel is opaque to the compiler, which would gather the batch for it.
                samples = P(AXES)
                kernel = jax.shard_map(kernel, mesh=mesh, in_specs=samples, out_specs=samples, check_vma=False)
            return kernel(query, key, value)
    if mask is not None or heads * queries * key.shape[1] <= SMALL_LOGITS:
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
    # One processor has the whole batch where there is one device.
    alone = mesh.size == 1 if not mesh.empty else jax.device_count() == 1
    cut = xla.cut_of(batch, heads, queries, key.shape[1], cut_batch=platform == "cpu" and alone)
    return xla.attend(query, key, value, cut)


def choose(kind: str, platform: str, dtype: DTypeLike, head_size: int, queries: int) -> str:
    """The kind that computes an attention without a mask: that which is named or, where it cannot, "xla".

    ``platform`` is as ``platform_of`` gives it.
    """
    if kind in ("auto", "cudnn") and platform == _PLATFORMS["cudnn"]:
        return "cudnn" if cudnn.fits(head_size, dtype) else "xla"
    long_enough = queries >= _SPLASH_QUERIES or kind == "splash"
    if kind in ("auto", "splash") and platform == _PLATFORMS["splash"] and long_enough:
        return "splash" if head_size <= splash.MAX_HEAD_SIZE else "xla"
    return "xla"


def check_kind(kind: str, platform: str, dtype: DTypeLike) -> None:
    """Raises UserError if ``config.attention`` names a kind that a platform does not have."""
    if platform != _PLATFORMS.get(kind, platform):
        where = {"cudnn": "NVIDIA GPUs from Ampere on", "splash": "TPUs"}[kind]
        raise UserError(f"config.attention = {kind!r} is for {where}, and this is a {platform}; use 'auto' or 'xla'.")
    if kind == "cudnn" and jnp.dtype(dtype) == jnp.float32:
        raise UserError(
            "config.attention = 'cudnn' has no float32; set --config.dtype=bfloat16, or --config.attention=xla."
        )


def describe_choice(kind: str, platform: str, dtype: DTypeLike) -> str:
    """A sentence on what a run takes."""
    kernel = choose(kind, platform, dtype, 64, _SPLASH_QUERIES)
    rest = "" if kernel == "xla" else ", and by xla where a head is large, a sequence short or a mask given"
    return f"attention by {kernel}{rest} (config.attention = {kind!r}, {platform}, {jnp.dtype(dtype)})."


def platform_of(device: jax.Device) -> str:
    """ "cpu", "tpu", "cuda" for a GPU that cuDNN has attention for, "gpu" for any other."""
    if device.platform not in ("gpu", "cuda"):
        return device.platform
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))  # AMD's are others
    return "cuda" if capability and tuple(map(int, capability.groups())) >= _AMPERE else "gpu"


def _device() -> tuple[str, str]:
    """Platform and name of the devices that are compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None or device.platform == jax.default_backend():
        here = jax.devices()[0]
        return platform_of(here), here.device_kind
    # A plan's, for a machine that is not here: its GPUs are those of planning/chips.py.
    return ("cuda" if device.platform == "gpu" else device.platform), device.device_kind
