"""What the devices send each other: the collectives of a compiled program, counted in ``compiled.as_text()``."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# "%name (parameters) -> type {", the first line of a computation
_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .*\{$")
# "  ROOT %name = type opcode(operands), attributes"; a type may be a tuple and has layouts such as {1,0:T(8,128)S(1)}
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][\w-]*)\((?P<operands>[^)]*)\)"
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.-]+))")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives that one execution of a program performs on each device.

    Attributes:
      counts: how often, by kind (one of ``KINDS``; kinds that do not occur are left out).
      bytes: by kind, the larger of what a device gives and what it gets: the whole array that an all-gather makes or a
        reduce-scatter takes, otherwise the device's own. What a link carries depends on the algorithm: a ring moves up
        to once that, and for an all-reduce up to twice.
      unknown_loops: loops with collectives whose number of rounds is not in the text; they count as one round.
    """

    counts: dict[str, int]
    bytes: dict[str, int]
    unknown_loops: int = 0

    @property
    def total_bytes(self) -> int:
        """Of all kinds."""
        return sum(self.bytes.values())


class _Instruction(NamedTuple):
    type: str
    opcode: str
    operands: list[str]
    is_root: bool
    text: str


_Computation = dict[str, _Instruction]  # by name


def collectives(hlo: str) -> Traffic:
    """Counts the collectives in the text of a compiled program, of any backend.

    - An asynchronous pair ``-start``, ``-done`` counts once. A TPU may cut a collective into pieces, in several fusions
      and of one channel, to overlap it with computation: these count once too, where the collective starts.
    - An all-reduce of which each device keeps its part (a TPU's fusion ``all-reduce-scatter``) is a reduce-scatter.
    - What is in a loop counts once for each round. The number of rounds is XLA's ``known_trip_count``, or is read from
      a condition that compares a counter with a constant: the form of ``scan`` and ``map``, whose counter starts at 0.
    - Of a conditional the branch with the most bytes counts.
    """
    computations, entry = _parse(hlo)
    instructions = [i for computation in computations.values() for i in computation.values()]
    fused = {name for i in instructions if i.opcode == "fusion" for name in _CALLED.findall(i.text)}
    starts = _starts(computations)

    @functools.cache
    def cost(name: str) -> Counter:
        """Of a computation; keys are (kind, "count"), (kind, "bytes") and ("loop", "unknown")."""
        total: Counter = Counter()
        for instruction in computations.get(name, {}).values():
            total.update(cost_of(name, instruction))
        return total

    def cost_of(computation: str, instruction: _Instruction) -> Counter:
        opcode, text = instruction.opcode, instruction.text
        if opcode.endswith(("-done", "-update")):
            return Counter()
        if (kind := opcode.removesuffix("-start")) in KINDS:
            if computation in fused and computation not in starts.get(_channel(text), {computation}):
                return Counter()  # goes on here, and started elsewhere
            if computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            return Counter({(kind, "count"): 1, (kind, "bytes"): _bytes(computations[computation], instruction)})
        if opcode == "conditional":
            names = re.findall(r"[\w.-]+", " ".join(name for found in _BRANCHES.findall(text) for name in found))
            return max(map(cost, names), key=lambda c: sum(n for (_, what), n in c.items() if what == "bytes"))
        total: Counter = Counter()
        for name in _CALLED.findall(text):
            total.update(cost(name))
        if opcode == "while" and total:
            rounds = _rounds(text, computations)
            if rounds is None:
                total["loop", "unknown"] += 1
            else:
                total = Counter({key: n if key[0] == "loop" else n * rounds for key, n in total.items()})
        return total

    total = cost(entry)
    counts, sizes = ({kind: total[kind, what] for kind in KINDS if total[kind, "count"]} for what in ("count", "bytes"))
    return Traffic(counts, sizes, total["loop", "unknown"])


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a module by name, and the name of the one that is run."""
    computations: dict[str, _Computation] = {}
    entry, current = "", {}
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations[header["name"]] = {}
            entry = header["name"] if header["entry"] else entry
        elif match := _INSTRUCTION.match(line):
            operands = re.findall(r"%([\w.-]+)", match["operands"])
            current[match["name"]] = _Instruction(match["type"], match["opcode"], operands, bool(match["root"]), line)
    return computations, entry


def _starts(computations: dict[str, _Computation]) -> dict[str, set[str]]:
    """In which computations the collectives of a channel start, for those that a TPU cuts into pieces.

    Layers that are traced once share the channels of the first layer, so a channel may start in several computations.
    """
    starts: dict[str, set[str]] = {}
    for name, computation in computations.items():
        if any('"AsyncCollectiveStart"' in instruction.text for instruction in computation.values()):
            for instruction in computation.values():
                if instruction.opcode in KINDS:
                    starts.setdefault(_channel(instruction.text), set()).add(name)
    return starts


def _channel(text: str) -> str:
    match = re.search(r"\bchannel_id=(\d+)", text)
    return match[1] if match else ""


def _bytes(computation: _Computation, instruction: _Instruction) -> int:
    """The larger of what a collective takes and what it gives."""
    operands = sum(_num_bytes(computation[name].type) for name in instruction.operands if name in computation)
    results = _num_bytes(instruction.type)
    if instruction.opcode == "all-gather-start":
        results -= operands  # a tuple of both
    elif instruction.opcode == "collective-permute-start":
        results = operands  # a tuple of both and of some words of bookkeeping
    return max(operands, results)


def _num_bytes(type_text: str) -> int:
    """Bytes of all arrays of a type such as ``(f32[8,128]{1,0}, s32[])``, without padding."""
    total = 0
    for name, dimensions in _ARRAY.findall(type_text):
        bits = 8 if name == "pred" else int(re.sub(r"\D", "", name) or 0)  # bf16, f8e4m3fn, s4, c64; a token has none
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
    return total


def _rounds(text: str, computations: dict[str, _Computation]) -> int | None:
    """The number of rounds of a loop, if the text says it."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', text):
        return int(match[1])
    name = re.search(r"\bcondition=%?([\w.-]+)", text)
    condition = computations.get(name[1], {}) if name else {}
    root = next((instruction for instruction in condition.values() if instruction.is_root), None)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.text or not root.operands:
        return None
    limit = condition.get(root.operands[-1])
    match = re.search(r" = s32\[\]\S* constant\((\d+)\)", limit.text) if limit else None
    return int(match[1]) if match else None
