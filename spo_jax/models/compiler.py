"""What is written for JAX and XLA and not for the mathematics: without it all results are the same.

- ``tied``: gradients of weights are computed early, so that the activations they need can be freed.
- ``call``: layers that are alike are traced once.
- ``weights``: initializers are traced in ``init`` only.

Two more of this kind stand where they are needed: ``attention._attend_in_pieces`` (loops that write over their
inputs) and ``distributed.sharding.gathered`` (weights travel, activations stay).
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.nn.initializers import Initializer
from jaxtyping import PyTree


@jax.custom_jvp
def tied(x: PyTree, weights: PyTree) -> tuple[PyTree, PyTree]:
    """Both unchanged; in the backward pass the gradients of ``weights`` are computed before that of ``x`` goes on.

    Only the optimizer waits for the gradient of a weight, so XLA would compute it at the end of the program and keep
    the activations of all layers until then (SD1.5 on a GPU: 5 GiB with adapters, 10 with all weights).
    """
    return x, weights


@functools.partial(tied.defjvp, symbolic_zeros=True)
def _tied_jvp(
    primals: tuple[PyTree, PyTree], tangents: tuple[PyTree, PyTree]
) -> tuple[tuple[PyTree, PyTree], tuple[PyTree, PyTree]]:
    leaves, tree = jax.tree.flatten(tangents, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    learns = [not isinstance(leaf, SymbolicZero) for leaf in leaves]
    if learns[0] and any(learns[1:]):
        # The transpose is a barrier between the gradients; what does not learn has none, and stays out.
        together = iter(jax.lax.optimization_barrier([leaf for leaf, one in zip(leaves, learns, strict=True) if one]))
        leaves = [next(together) if one else leaf for leaf, one in zip(leaves, learns, strict=True)]
    return primals, jax.tree.unflatten(tree, leaves)


def call(parent: nn.Module, layer: nn.Module, name: str, *args: jax.Array | None, remat: bool = False) -> jax.Array:
    """``layer(*args)`` with the weights that ``parent`` has under ``name``; layers that are alike are traced once.

    Networks repeat few layers often (a ViT-H one of them 32 times, SDXL's UNet one 60 times), and tracing them takes
    most of the time before a program is compiled. The compiler inlines the calls.

    Args:
      parent: the module that runs.
      layer: a module without parent or name; layers of equal fields, shapes and dtypes are alike. It must not draw
        random numbers or change variables. Where intermediates are captured, each layer is traced.
      name: of the layer's weights.
      *args: arrays, or None.
      remat: recompute what is inside the layer in the backward pass instead of keeping it.
    """
    if parent.is_mutable_collection("intermediates") and not parent.is_initializing():
        return layer.clone(parent=parent, name=name)(*args)
    if parent.is_initializing():
        parent.param(name, functools.partial(_init, layer), *args)
    given = {kind: of[name] for kind, of in parent.variables.items() if name in of}
    return _call(layer, remat, given, *args)


@functools.partial(jax.jit, static_argnums=0)
def _init(layer: nn.Module, key: jax.Array, *args: jax.Array | None) -> PyTree:
    return layer.init(key, *args)["params"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(layer: nn.Module, remat: bool, variables: PyTree, *args: jax.Array | None) -> jax.Array:
    apply = jax.checkpoint(layer.apply) if remat else layer.apply
    return apply(variables, *args)


def weights(layer: nn.Module, **declared: tuple[Initializer, tuple[int, ...]]) -> dict[str, jax.Array]:
    """The weights of ``layer``: in ``init`` made from (initializer, shape), afterwards those that ``apply`` was given.

    ``layer.param`` would trace the initializer at every call, for its shape: a fifth of the time to trace a UNet.
    """
    if layer.is_initializing():
        return {name: layer.param(name, init, shape, jnp.float32) for name, (init, shape) in declared.items()}
    given = layer.variables["params"]
    return {name: given[name] for name in declared}
