"""FLOPs and peak memory of a program from its jaxpr, in seconds: what is live when, if elementwise work is fused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from jax.extend import core

# What makes an array of its own. XLA computes everything else where it is used: elementwise work and changes of shape.
_MADE = (
    "argm",
    "concatenate",
    "cond",
    "conv_general",
    "cum",
    "custom_call",
    "dot_general",
    "dynamic_",
    "ffi_call",
    "gather",
    "pallas_call",
    "random_bits",
    "reduce_",
    "scan",
    "scatter",
    "sort",
    "stack",
    "top_k",
    "while",
)
_INLINED = ("pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_REMAT = ("remat", "remat2", "checkpoint")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program costs.

    Attributes:
      flops: of matrix products and convolutions.
      peak: the most bytes of its own arrays at one time.
      products: products and convolutions in its text, those in loops once.
    """

    flops: float
    peak: int
    products: int = 0


@dataclasses.dataclass
class _Step:
    """What one equation does to memory: buffers it reads and makes, and bytes that it needs only meanwhile."""

    reads: frozenset[int]
    makes: list[int]
    meanwhile: int = 0
    in_place: bool = False


def walk(
    jaxpr: core.Jaxpr, size_of: Callable[[Any], int], *, fuses_operands: bool = True, num_donated: int = 0
) -> Cost:
    """Adds up FLOPs and follows what is live.

    Elementwise work and changes of shape make no array of their own, but where they bring two large arrays together (a
    residual connection): the sum then takes the place of one of them. Products, convolutions, reductions and everything
    else make their result. Arrays live from where they are made to where they are used last, in the order of the jaxpr.

    Args:
      jaxpr: of one device's share of the work.
      size_of: bytes of an array, from its ``aval``.
      num_donated: the first so many results take the place of arguments.
      fuses_operands: whether elementwise work is fused into the operands of products and convolutions (TPU), or has to
        be written out for them (GPU, CPU).
    """
    sizes: list[int] = []
    steps: list[_Step] = []
    flops, products = 0.0, 0

    def buffer(aval: Any) -> int:
        sizes.append(size_of(aval))
        return len(sizes) - 1

    def visit(jaxpr: core.Jaxpr, arguments: Iterable[frozenset[int]]) -> list[frozenset[int]]:
        nonlocal flops, products
        env: dict[Any, frozenset[int]] = dict(zip(jaxpr.invars, arguments, strict=True))
        written: set[Any] = set(jaxpr.invars)  # variables that are arrays in memory as they are

        users: dict[Any, list[str]] = {}
        for eqn in jaxpr.eqns:
            for atom in eqn.invars:
                if isinstance(atom, core.Var):
                    users.setdefault(atom, []).append(eqn.primitive.name)
        for atom in jaxpr.outvars:
            if isinstance(atom, core.Var):
                users.setdefault(atom, []).append("return")

        def read(atom: Any) -> frozenset[int]:
            return env.get(atom, frozenset()) if isinstance(atom, core.Var) else frozenset()

        def unwritten(eqn: Any, roots: list[frozenset[int]]) -> int:
            """Bytes of operands that would be computed where they are used, and have to be written out for it."""
            operands = zip(eqn.invars, roots, strict=True)
            return sum(size_of(atom.aval) for atom, root in operands if root and atom not in written)

        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            roots = [read(atom) for atom in eqn.invars]
            reads = frozenset().union(*roots)
            inner = _inlined(eqn)
            if inner is not None:
                results = visit(inner, roots)
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            if name == "optimization_barrier":
                env.update(zip(eqn.outvars, roots, strict=True))
                continue
            if _fuses(name):
                for out in eqn.outvars:
                    size = size_of(out.aval)
                    large = [r for r in reads if 2 * sizes[r] >= size]
                    repeats = name == "broadcast_in_dim" and any(size > sizes[r] > _SMALL for r in reads)
                    waits = len(users.get(out, [])) == 1 and _fuses(users[out][0])
                    if (len(large) > 1 or repeats) and not waits and len(eqn.outvars) == 1 and size > _SMALL:
                        made = buffer(out.aval)
                        steps.append(_Step(reads, [made], in_place=not repeats))
                        env[out] = frozenset([made])
                        written.add(out)
                    else:
                        env[out] = reads
                continue
            meanwhile = 0
            if name == "scan":
                body = eqn.params["jaxpr"].jaxpr
                cost = walk(body, size_of, fuses_operands=fuses_operands)
                flops, products = flops + cost.flops * eqn.params["length"], products + cost.products
                meanwhile = cost.peak
            elif name == "while":
                cost = walk(eqn.params["body_jaxpr"].jaxpr, size_of, fuses_operands=fuses_operands)
                flops, products = flops + cost.flops, products + cost.products
                meanwhile = cost.peak
            elif name == "cond":
                costs = [walk(b.jaxpr, size_of, fuses_operands=fuses_operands) for b in eqn.params["branches"]]
                flops += max(c.flops for c in costs)
                products += sum(c.products for c in costs)
                meanwhile = max(c.peak for c in costs) + unwritten(eqn, roots)
            elif name in ("dot_general", "conv_general_dilated"):
                flops, products = flops + _flops(eqn), products + 1
                if not fuses_operands:
                    meanwhile = unwritten(eqn, roots)
            made_here = []
            for out in eqn.outvars:
                made_here.append(buffer(out.aval))
                env[out] = frozenset(made_here[-1:])
                written.add(out)
            steps.append(_Step(reads, made_here, meanwhile, in_place=name in _IN_PLACE))
        return [read(atom) for atom in jaxpr.outvars]

    results = visit(jaxpr, [frozenset()] * len(jaxpr.invars))
    chosen = {out for eqn in jaxpr.eqns if eqn.primitive.name == "cond" for out in eqn.outvars}
    for atom, roots in zip(jaxpr.outvars[:num_donated], results, strict=False):
        if atom in chosen:  # both branches write over the argument
            sizes[min(roots)] = 0
    peak = _peak(steps, sizes, frozenset().union(*results[num_donated:]))
    return Cost(flops, peak, products)


_SMALL = 2**16
_IN_PLACE = ("dynamic_update_slice", "scatter", "scatter-add")


def _peak(steps: list[_Step], sizes: list[int], kept: frozenset[int]) -> int:
    last = {}
    for i, step in enumerate(steps):
        for b in (*step.reads, *step.makes):
            last[b] = i
    last.update(dict.fromkeys(kept, len(steps)))
    dying: dict[int, list[int]] = {}
    for b, i in last.items():
        dying.setdefault(i, []).append(b)
    live = peak = 0
    for i, step in enumerate(steps):
        made = sum(sizes[b] for b in step.makes)
        freed = sum(sizes[b] for b in dying.get(i, []))
        if step.in_place:
            old = sum(sizes[b] for b in dying.get(i, []) if b not in step.makes)
            peak = max(peak, live + max(0, made - old) + step.meanwhile)
        else:
            peak = max(peak, live + made + step.meanwhile)
        live += made - freed
    return peak


def _fuses(name: str) -> bool:
    """Whether an operation is computed where its result is used."""
    return name == "reduce_precision" or not name.startswith((*_MADE, *_INLINED, *_REMAT, "return"))


def _inlined(eqn: Any) -> core.Jaxpr | None:
    """The jaxpr that an equation stands for, if it is a call."""
    if eqn.primitive.name in (*_INLINED, *_REMAT):
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in eqn.params:
                inner = eqn.params[key]
                return inner.jaxpr if hasattr(inner, "jaxpr") else inner
    return None


def _flops(eqn: Any) -> float:
    """Of a matrix product or a convolution: two for each multiplication and addition."""
    out = eqn.outvars[0].aval
    if eqn.primitive.name == "dot_general":
        (contracting, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracting)
    kernel = eqn.invars[1].aval
    out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * out.size * kernel.size / out_features
