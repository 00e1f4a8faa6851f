"""FLOPs and peak memory of a program from its jaxpr, in seconds: what is live when, if elementwise work is fused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

# What makes an array of its own, by how its name begins. XLA computes everything else where it is used: elementwise
# work and changes of shape.
_MADE = (
    *("argm", "concatenate", "cond", "conv_general", "cum", "custom_call", "dot_general", "dynamic_", "ffi_call"),
    *("gather", "pallas_call", "random_bits", "reduce_", "scan", "scatter", "sort", "stack", "top_k", "while"),
)
_CALLS = (
    *("pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
    *("remat", "remat2", "checkpoint"),
)
_IN_PLACE = ("dynamic_update_slice", "scatter", "scatter-add")
_SMALL = 2**16  # bytes; smaller arrays are not followed where elementwise work joins them

Aval = Any  # jax.core.ShapedArray, which jaxprs declare as an AbstractValue without shape and dtype
SizeOf = Callable[[Aval], int]
Buffers = frozenset[int]  # the arrays that a value is computed from


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program costs.

    Attributes:
      flops: of matrix products and convolutions, with all rounds of scans.
      peak: the most bytes of its own arrays at one time.
      products: matrix products and convolutions in its text; those in loops count once.
    """

    flops: float
    peak: int
    products: int = 0


def walk(jaxpr: core.Jaxpr, size_of: SizeOf, *, fuses_operands: bool = True, num_donated: int = 0) -> Cost:
    """Adds up FLOPs and follows which arrays are live.

    Products, convolutions, reductions and loops make their results. Elementwise work and changes of shape make no array
    of their own, except where they join two large arrays (a residual connection): then the sum takes the place of one
    of them. An array lives from where it is made to its last use, in the order of the jaxpr.

    Args:
      jaxpr: of one device's share of the work.
      size_of: bytes of an array, from its ``aval``.
      fuses_operands: whether elementwise work is fused into the operands of products and convolutions (TPU), or must be
        written out for them (GPU, CPU).
      num_donated: so many results, the first ones, take the place of arguments.
    """
    program = _Program(size_of, fuses_operands)
    results = program.visit(jaxpr, [frozenset()] * len(jaxpr.invars))
    chosen = {out for eqn in jaxpr.eqns if eqn.primitive.name == "cond" for out in eqn.outvars}
    for atom, buffers in zip(jaxpr.outvars[:num_donated], results, strict=False):
        if atom in chosen:  # both branches write over the argument
            program.sizes[min(buffers)] = 0
    return Cost(program.flops, program.peak(frozenset().union(*results[num_donated:])), program.products)


@dataclasses.dataclass
class _Step:
    """What one equation does to memory: the buffers it reads and makes, and bytes that it needs only meanwhile."""

    reads: Buffers
    makes: list[int]
    meanwhile: int = 0
    in_place: bool = False


@dataclasses.dataclass
class _Program:
    """What the walk has found so far: bytes of each buffer, and steps in their order."""

    size_of: SizeOf
    fuses_operands: bool
    sizes: list[int] = dataclasses.field(default_factory=list)
    steps: list[_Step] = dataclasses.field(default_factory=list)
    flops: float = 0.0
    products: int = 0

    def visit(self, jaxpr: core.Jaxpr, arguments: Sequence[Buffers]) -> list[Buffers]:
        """Follows the equations, those of calls in their place; returns what the results are computed from."""
        env = dict(zip(jaxpr.invars, arguments, strict=True))
        written = set(jaxpr.invars)  # variables that are arrays in memory as they are
        users = _users(jaxpr)

        def read(atom: core.Var | core.Literal) -> Buffers:
            return env.get(atom, frozenset()) if isinstance(atom, core.Var) else frozenset()

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if (inner := _inlined(eqn)) is not None:
                results = self.visit(inner, operands)
            elif eqn.primitive.name == "optimization_barrier":
                results = operands
            elif _fuses(eqn.primitive.name):
                results, made = self.fuse(eqn, frozenset().union(*operands), users)
                written.update(made)
            else:
                # Operands that would be computed where they are used, and have to be written out for this.
                fused = [atom for atom, of in zip(eqn.invars, operands, strict=True) if of and atom not in written]
                meanwhile = self.work(eqn, sum(self.size_of(atom.aval) for atom in fused))
                in_place = eqn.primitive.name in _IN_PLACE
                results = self.make(eqn, frozenset().union(*operands), meanwhile, in_place=in_place)
                written.update(eqn.outvars)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def make(self, eqn: core.JaxprEqn, reads: Buffers, meanwhile: int = 0, *, in_place: bool) -> list[Buffers]:
        """A new buffer for each result of an equation."""
        makes = list(range(len(self.sizes), len(self.sizes) + len(eqn.outvars)))
        self.sizes += [self.size_of(out.aval) for out in eqn.outvars]
        self.steps.append(_Step(reads, makes, meanwhile, in_place))
        return [frozenset([buffer]) for buffer in makes]

    def fuse(
        self, eqn: core.JaxprEqn, reads: Buffers, users: dict[core.Var, list[str]]
    ) -> tuple[list[Buffers], list[core.Var]]:
        """Elementwise work, or a change of shape: the buffers of each result, and the results that are written."""
        if len(eqn.outvars) == 1:
            out = eqn.outvars[0]
            size, sizes = self.size_of(out.aval), [self.sizes[buffer] for buffer in reads]
            joins = sum(2 * other >= size for other in sizes) > 1
            repeats = eqn.primitive.name == "broadcast_in_dim" and any(size > other > _SMALL for other in sizes)
            goes_on = len(users.get(out, [])) == 1 and _fuses(users[out][0])
            if size > _SMALL and (joins or repeats) and not goes_on:
                return self.make(eqn, reads, in_place=not repeats), [out]
        return [reads] * len(eqn.outvars), []

    def work(self, eqn: core.JaxprEqn, unwritten: int) -> int:
        """Counts the work of an equation; returns the bytes that it needs only meanwhile."""
        name = eqn.primitive.name
        if name in ("dot_general", "conv_general_dilated"):
            self.flops, self.products = self.flops + _flops(eqn), self.products + 1
            return 0 if self.fuses_operands else unwritten
        if name not in ("scan", "while", "cond"):
            return 0
        body = {"scan": "jaxpr", "while": "body_jaxpr"}.get(name)
        bodies = [eqn.params[body]] if body else eqn.params["branches"]
        costs = [walk(body.jaxpr, self.size_of, fuses_operands=self.fuses_operands) for body in bodies]
        self.flops += max(cost.flops for cost in costs) * eqn.params.get("length", 1)
        self.products += sum(cost.products for cost in costs)
        return max(cost.peak for cost in costs) + (unwritten if name == "cond" else 0)

    def peak(self, kept: Buffers) -> int:
        """The most bytes at one time; ``kept`` live to the end."""
        last = {buffer: i for i, step in enumerate(self.steps) for buffer in (*step.reads, *step.makes)}
        last.update(dict.fromkeys(kept, len(self.steps)))
        dying: dict[int, list[int]] = {}
        for buffer, i in last.items():
            dying.setdefault(i, []).append(buffer)
        live = most = 0
        for i, step in enumerate(self.steps):
            made = sum(self.sizes[buffer] for buffer in step.makes)
            dies = dying.get(i, [])
            replaced = sum(self.sizes[buffer] for buffer in dies if buffer not in step.makes) if step.in_place else 0
            most = max(most, live + max(0, made - replaced) + step.meanwhile)
            live += made - sum(self.sizes[buffer] for buffer in dies)
        return most


def _users(jaxpr: core.Jaxpr) -> dict[core.Var, list[str]]:
    """The names of the operations that read each variable, "return" for the end."""
    users: dict[core.Var, list[str]] = {}
    for name, atoms in (*((eqn.primitive.name, eqn.invars) for eqn in jaxpr.eqns), ("return", jaxpr.outvars)):
        for atom in atoms:
            if isinstance(atom, core.Var):
                users.setdefault(atom, []).append(name)
    return users


def _fuses(name: str) -> bool:
    """Whether an operation is computed where its result is used."""
    return name == "reduce_precision" or not name.startswith((*_MADE, *_CALLS, "return"))


def _inlined(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """The jaxpr that an equation stands for, if it is a call."""
    if eqn.primitive.name in _CALLS:
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in eqn.params:
                inner = eqn.params[key]
                return inner.jaxpr if hasattr(inner, "jaxpr") else inner
    return None


def _flops(eqn: core.JaxprEqn) -> float:
    """Of a matrix product or a convolution: two for each multiplication and addition."""
    avals: list[Aval] = [atom.aval for atom in (*eqn.invars, *eqn.outvars)]
    x, kernel, out = avals
    if eqn.primitive.name == "dot_general":
        (contracting, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out.size * math.prod(x.shape[d] for d in contracting)
    out_features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * out.size * kernel.size / out_features
