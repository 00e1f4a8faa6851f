"""Milliseconds of the parts of which SPO's time is made, ours and PyTorch's, forward and with the backward pass.

    python -m benchmarks.pieces                       # networks of --size=small, attention and norms; batch 8, float32
    python -m benchmarks.pieces --only=attention      # those with this in their name
    python -m benchmarks.pieces --size=sd15 --device=gpu --dtype=bfloat16 --batch=16

Both run in one process by turns, each after a call that is not timed; medians. The backward pass is with regard to the
inputs of a layer, and to the adapters of the UNet; decoder and scorer learn nothing, so they have none. Where both
outputs are not the same the run ends. Needs requirements-test.txt.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from torch.nn import functional

from benchmarks import our_iteration, pytorch_iteration
from benchmarks.check import TOLERANCE
from benchmarks.measure import DISTURBED, MAX_OTHERS, others_seconds
from benchmarks.models import SIZES, Size, model_folder
from benchmarks.torch_scorer import image_features
from spo_jax import cli
from spo_jax.errors import UserError, notice
from spo_jax.kernels.attention import multi_head_attention
from spo_jax.models.layers import GroupNorm

SIZE = flags.DEFINE_enum("size", "small", list(SIZES), "Of the networks; see benchmarks/models.py.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "In which everything computes.")
DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where both run.")
BATCH = flags.DEFINE_integer("batch", 8, "Rows of each input.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls, by turns.", lower_bound=1)
ONLY = flags.DEFINE_string("only", "", "Part of the names of what is measured.")
FOLDER = flags.DEFINE_string("folder", "", "Where random models are kept; the user's cache by default.")

PAUSE = 0.2  # seconds between turns, in which the threads of the one before go to sleep
Call = Callable[[], Any]  # runs once; its result may not be there yet


class Piece(NamedTuple):
    """What is measured.

    Attributes:
      forward: of PyTorch and of ours; results [..., c, h, w] of PyTorch are [..., h, w, c] of ours if ``images``.
      backward: the same with the backward pass, or None.
      images: see ``forward``.
    """

    forward: tuple[Call, Call]
    backward: tuple[Call, Call] | None = None
    images: bool = False


class Shape(NamedTuple):
    """Of attention: queries, keys, heads and the width of one."""

    queries: int
    keys: int
    heads: int
    width: int


SHAPES = {
    "self-attention 32x32, 8 heads of 8": Shape(1024, 1024, 8, 8),
    "self-attention 32x32, 8 heads of 40": Shape(1024, 1024, 8, 40),
    "self-attention 16x16, 8 heads of 16": Shape(256, 256, 8, 16),
    "self-attention 32x32, 1 head of 128 (VAE)": Shape(1024, 1024, 1, 128),
    "self-attention 257, 4 heads of 64 (CLIP)": Shape(257, 257, 4, 64),
    "self-attention 257, 16 heads of 80 (CLIP)": Shape(257, 257, 16, 80),
    "cross-attention 32x32 on 77, 8 heads of 8": Shape(1024, 77, 8, 8),
    "cross-attention 32x32 on 77, 8 heads of 40": Shape(1024, 77, 8, 40),
}
NORMS = {"GroupNorm + SiLU 32x32x64": (32, 64), "GroupNorm + SiLU 128x128x64": (128, 64)}
NETWORKS = ("UNet", "VAE decoder", "scorer")


def main() -> None:
    """Prints a row as soon as it is known."""
    if DEVICE.value == "cpu":
        jax.config.update("jax_platforms", "cpu")
    device = pytorch_iteration.prepare(DEVICE.value)
    print(
        f"Batch {BATCH.value}, {DTYPE.value} on {DEVICE.value}, networks of {SIZE.value}; "
        f"jax {jax.__version__}, torch {torch.__version__}; ms, medians of {REPEATS.value}\n"
    )
    print("| piece | PyTorch | ours | ratio | with backward: PyTorch | ours | ratio |\n|---|---|---|---|---|---|---|")
    began, busy = time.perf_counter(), others_seconds()
    for name, make in pieces(device).items():
        if ONLY.value.lower() not in name.lower():
            continue
        piece = make()
        check_same(name, piece)
        cells = []
        for calls in (piece.forward, piece.backward):
            theirs, ours = by_turns(calls) if calls else (None, None)
            cells += [f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.2f}"] if calls else ["", "", ""]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if DEVICE.value == "cpu" and (others_seconds() - busy) / (time.perf_counter() - began) > MAX_OTHERS:
        notice(DISTURBED)


def pieces(device: str) -> dict[str, Callable[[], Piece]]:
    """What makes each, by name."""
    made: dict[str, Callable[[], Piece]] = {}
    loaded = functools.cache(functools.partial(load, SIZES[SIZE.value], device))
    for name in NETWORKS:
        made[name] = functools.partial(lambda name: network(name, *loaded(), device), name)
    made |= {name: functools.partial(attention, shape, device) for name, shape in SHAPES.items()}
    return made | {name: functools.partial(norm, *sizes, device) for name, sizes in NORMS.items()}


def by_turns(calls: tuple[Call, Call]) -> list[float]:
    """Milliseconds of each, medians."""
    taken: list[list[float]] = [[], []]
    for _ in range(REPEATS.value):
        for times, call in zip(taken, calls, strict=True):
            time.sleep(PAUSE)
            wait(call())
            start = time.perf_counter()
            wait(call())
            times.append(1e3 * (time.perf_counter() - start))
    return [median(times) for times in taken]


def wait(result: Any) -> None:
    """Until it is computed."""
    jax.block_until_ready(result)
    if DEVICE.value == "gpu":
        torch.cuda.synchronize()


def check_same(name: str, piece: Piece) -> None:
    """UserError if the outputs differ, in float32 on the CPU; elsewhere the factors of products are rounded."""
    theirs, ours = (
        np.float32(x.detach().float().cpu() if isinstance(x, torch.Tensor) else x)
        for x in (call() for call in piece.forward)
    )
    theirs = np.moveaxis(theirs, -3, -1) if piece.images else theirs
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    if not difference <= TOLERANCE and DTYPE.value == "float32" and DEVICE.value == "cpu":
        raise UserError(f"{name}: the outputs of PyTorch and ours differ by {difference:.1e} of the largest value.")


# ------------------------------------------------------------------------------------------------------------- layers
def inputs(device: str, *shapes: tuple[int, ...]) -> tuple[list[torch.Tensor], list[jax.Array]]:
    """Random arrays for both, in the dtype of the run."""
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(shape, np.float32) for shape in shapes]
    theirs = [torch.from_numpy(x).to(device, getattr(torch, DTYPE.value)) for x in arrays]
    return theirs, [jnp.asarray(x, DTYPE.value) for x in arrays]


def with_backward(
    layer: Callable[..., torch.Tensor], our_layer: Callable[..., jax.Array], theirs: list, ours: list
) -> tuple[Call, Call]:
    """Output and gradients of the inputs; the last array of each list is the gradient of the output."""
    *tensors, cotangent = theirs
    *arrays, our_cotangent = ours

    def run_theirs() -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        layer(*leaves).backward(cotangent)
        return [leaf.grad for leaf in leaves]

    @jax.jit
    def run_ours(arrays: list[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(our_layer, *arrays)[1](cotangent)

    return run_theirs, lambda: run_ours(arrays, our_cotangent)


def attention(shape: Shape, device: str) -> Piece:
    """From projected queries, keys and values [B, L, heads * width], as the layers around have them."""
    heads, channels, batch = shape.heads, shape.heads * shape.width, BATCH.value
    query, key = (batch, shape.queries, channels), (batch, shape.keys, channels)
    theirs, ours = inputs(device, query, key, key, query)

    def layer(*tensors: torch.Tensor) -> torch.Tensor:
        split = (x.view(batch, -1, heads, shape.width).transpose(1, 2) for x in tensors)
        return functional.scaled_dot_product_attention(*split).transpose(1, 2).reshape(batch, -1, channels)

    our_layer = functools.partial(multi_head_attention, num_heads=heads)
    compiled, no_grad = jax.jit(our_layer), torch.no_grad()(layer)
    forward = (lambda: no_grad(*theirs[:3]), lambda: compiled(*ours[:3]))
    return Piece(forward, with_backward(layer, our_layer, theirs, ours))


def norm(side: int, channels: int, device: str) -> Piece:
    """32 groups, with scale 1 and bias 0, which do not learn."""
    theirs, ours = inputs(device, *[(BATCH.value, channels, side, side)] * 2)
    ours = [jnp.moveaxis(x, 1, -1) for x in ours]
    module = torch.nn.GroupNorm(32, channels, eps=1e-5).to(device, theirs[0].dtype).requires_grad_(False)
    our_module = GroupNorm(32, 1e-5, jnp.dtype(DTYPE.value))
    variables = our_module.init(jax.random.key(0), ours[0])

    def layer(x: torch.Tensor) -> torch.Tensor:
        return functional.silu(module(x))

    def our_layer(x: jax.Array) -> jax.Array:
        return nn.silu(our_module.apply(variables, x))

    compiled, no_grad = jax.jit(our_layer), torch.no_grad()(layer)
    forward = (lambda: no_grad(theirs[0]), lambda: compiled(ours[0]))
    return Piece(forward, with_backward(layer, our_layer, theirs, ours), images=True)


# ----------------------------------------------------------------------------------------------------------- networks
def load(size: Size, device: str) -> tuple[pytorch_iteration.Program, our_iteration.SPO]:
    """The models of both."""
    folder: Path = model_folder(SIZE.value, FOLDER.value)
    theirs = pytorch_iteration.load(size.work, folder, device, getattr(torch, DTYPE.value))
    return theirs, our_iteration.load(size.work, folder, DTYPE.value)


def network(name: str, theirs: pytorch_iteration.Program, ours: our_iteration.SPO, device: str) -> Piece:
    """One of ``NETWORKS``; the UNet without guidance, as each row costs the same."""
    batch, pixels = BATCH.value, theirs.work.pixels
    if name == "UNet":
        return unet(theirs, ours, device)
    times = jnp.full(batch, 501), torch.full((batch,), 501, device=device)
    if name == "VAE decoder":
        (x,), (y,) = inputs(device, (batch, *theirs.latent_shape))
        decode = jax.jit(lambda params, x: ours.pipeline.vae.apply({"params": params}, x, method="decode"))
        call, arguments = (lambda: theirs.vae.decode(x).sample), (ours.params["vae"], jnp.moveaxis(y, 1, -1))
    else:
        (x,), (y,) = inputs(device, (batch, 3, pixels, pixels))
        given = torch.randn(batch, theirs.scorer.config.projection_dim, device=device)
        text = jnp.asarray(given.cpu().numpy())
        assert ours.scorer.of_images is not None
        decode = jax.jit(ours.scorer.of_images.score)
        arguments = (ours.params["scorer"], jnp.moveaxis(y, 1, -1), text, times[0])

        def call() -> torch.Tensor:
            features = image_features(theirs.scorer, x, times[1])
            return theirs.scorer.logit_scale.float().exp() * (features * given).sum(-1)

    return Piece((torch.no_grad()(call), lambda: decode(*arguments)), images=name == "VAE decoder")


def unet(theirs: pytorch_iteration.Program, ours: our_iteration.SPO, device: str) -> Piece:
    """Forward, and the gradient of the adapters."""
    batch, config = BATCH.value, theirs.unet.config
    tokens = theirs.text_encoder.config.max_position_embeddings
    shapes = (batch, *theirs.latent_shape), (batch, tokens, config.cross_attention_dim)
    (x, context, cotangent), (y, our_context, our_cotangent) = inputs(device, *shapes, shapes[0])
    y, our_cotangent = (jnp.moveaxis(value, 1, -1) for value in (y, our_cotangent))
    times = torch.full((batch,), 501, device=device)
    adapters = [parameter for parameter in theirs.unet.parameters() if parameter.requires_grad]

    def layer() -> torch.Tensor:
        return theirs.unet(x, times, context).sample

    def backward() -> list[torch.Tensor]:
        return list(torch.autograd.grad(layer(), adapters, cotangent))

    @jax.jit
    def our_layer(trained: Any, params: Any, x: jax.Array) -> jax.Array:
        return ours.pipeline.unet.apply({"params": params, **trained}, x, jnp.full(batch, 501), our_context)

    @jax.jit
    def our_backward(trained: Any, params: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda trained: our_layer(trained, params, x), trained)[1](our_cotangent)

    given = ours.state.trained, ours.params["unet"], y
    calls = (torch.no_grad()(layer), lambda: our_layer(*given)), (backward, lambda: our_backward(*given))
    return Piece(*calls, images=True)


if __name__ == "__main__":
    cli.run(main)
