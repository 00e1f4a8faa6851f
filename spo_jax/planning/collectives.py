"""How much the devices talk: the collectives of a compiled program, counted in its text (``compiled.as_text()``)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

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
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives that one execution of a program performs on each device.

    Attributes:
      counts: how often, by kind (one of ``KINDS``; those that do not occur are left out).
      bytes: by kind, of the larger of what a device gives and what it gets: the whole array that an all-gather makes
        or a reduce-scatter takes, otherwise the device's own. What a link carries depends on the algorithm; a ring
        moves up to once that, and in an all-reduce up to twice.
      unknown_loops: loops with collectives whose number of rounds is not in the text; they count as one round.
    """

    counts: dict[str, int]
    bytes: dict[str, int]
    unknown_loops: int = 0

    @property
    def total_bytes(self) -> int:
        """Of all kinds."""
        return sum(self.bytes.values())


@dataclasses.dataclass
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    text: str


@dataclasses.dataclass
class _Computation:
    name: str = ""
    instructions: dict[str, _Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""


def collectives(hlo: str) -> Traffic:
    """Counts the collectives in the text of a compiled program, of any backend.

    - An asynchronous pair ``-start``, ``-done`` counts once. So do the pieces, in several fusions and of one channel,
      that a TPU makes of a collective to overlap it with computation: where it starts, also if it goes on in a loop.
    - An all-reduce of which each device keeps its part (a TPU's fusion ``all-reduce-scatter``) is a reduce-scatter.
    - What is in a loop counts as often as the loop turns. The number is XLA's ``known_trip_count``, or is read from a
      condition that compares a counter with a constant: the form of ``scan`` and ``map``, whose counter starts at 0.
    - Of a conditional the branch with the most bytes counts.
    """
    computations, entry = _parse(hlo)
    starts = _starts(computations)
    known: dict[str, Counter] = {}

    def cost(name: str) -> Counter:
        """Keys are (kind, "count"), (kind, "bytes") and ("loop", "unknown")."""
        if name not in known:
            total: Counter = Counter()
            for instruction in computations.get(name, _Computation()).instructions.values():
                total.update(cost_of(computations[name], instruction))
            known[name] = total
        return known[name]

    def cost_of(computation: _Computation, instruction: _Instruction) -> Counter:
        opcode, text = instruction.opcode, instruction.text
        if opcode.endswith(("-done", "-update")):
            return Counter()
        if (kind := opcode.removesuffix("-start")) in KINDS:
            return _one(kind, computation, instruction)
        if opcode == "fusion":
            return fused(_CALLED.findall(text))
        if opcode == "conditional":
            names = re.findall(
                r"[\w.-]+", " ".join(filter(None, (name for m in _BRANCHES.findall(text) for name in m)))
            )
            return max(map(cost, names), key=lambda c: sum(n for (_, what), n in c.items() if what == "bytes"))
        total: Counter = Counter()
        for name in _CALLED.findall(text):
            total.update(cost(name))
        if opcode == "while" and total:
            condition = _CONDITION.search(text)
            rounds = _rounds(text, computations.get(condition[1]) if condition else None)
            if rounds is None:
                total["loop", "unknown"] += 1
            else:
                total = Counter({key: n if key[0] == "loop" else n * rounds for key, n in total.items()})
        return total

    def fused(names: list[str]) -> Counter:
        """Collectives inside a fusion, but for those that have started in another."""
        total: Counter = Counter()
        for computation in (computations[name] for name in names if name in computations):
            scatters = computation.name.startswith("all-reduce-scatter")
            for instruction in computation.instructions.values():
                if instruction.opcode == "fusion":
                    total.update(fused(_CALLED.findall(instruction.text)))
                    continue
                kind = instruction.opcode.removesuffix("-start")
                if kind in KINDS and computation.name in starts.get(_channel(instruction), {computation.name}):
                    total.update(_one("reduce-scatter" if scatters else kind, computation, instruction))
        return total

    total = cost(entry)
    counts, sizes = ({kind: total[kind, what] for kind in KINDS if total[kind, "count"]} for what in ("count", "bytes"))
    return Traffic(counts, sizes, total["loop", "unknown"])


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a module by name, and the name of the one that is run."""
    computations: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations[header["name"]] = _Computation(header["name"])
            entry = header["name"] if header["entry"] else entry
        elif match := _INSTRUCTION.match(line):
            operands = re.findall(r"%([\w.-]+)", match["operands"])
            instruction = _Instruction(match["name"], match["type"], match["opcode"], operands, line)
            current.instructions[instruction.name] = instruction
            if match["root"]:
                current.root = instruction.name
    return computations, entry


def _starts(computations: dict[str, _Computation]) -> dict[str, set[str]]:
    """In which computations the collectives of a channel start, for those that a TPU takes to pieces.

    They are several where layers are traced once for all of them: each has the channels of the first.
    """
    starts: dict[str, set[str]] = {}
    for computation in computations.values():
        if any('"AsyncCollectiveStart"' in instruction.text for instruction in computation.instructions.values()):
            for instruction in computation.instructions.values():
                if instruction.opcode in KINDS:
                    starts.setdefault(_channel(instruction), set()).add(computation.name)
    return starts


def _channel(instruction: _Instruction) -> str:
    match = _CHANNEL.search(instruction.text)
    return match[1] if match else ""


def _one(kind: str, computation: _Computation, instruction: _Instruction) -> Counter:
    operands = sum(
        _num_bytes(computation.instructions[name].type)
        for name in instruction.operands
        if name in computation.instructions
    )
    results = _num_bytes(instruction.type)
    if instruction.opcode == "all-gather-start":
        results -= operands  # a tuple of both
    elif instruction.opcode == "collective-permute-start":
        results = operands  # a tuple of both and of some words of bookkeeping
    return Counter({(kind, "count"): 1, (kind, "bytes"): max(operands, results)})


def _num_bytes(type_text: str) -> int:
    """Bytes of all arrays of a type such as ``(f32[8,128]{1,0}, s32[])``, without padding."""
    total = 0
    for name, dimensions in _ARRAY.findall(type_text):
        bits = 8 if name == "pred" else int(re.sub(r"\D", "", name) or 0)  # bf16, f8e4m3fn, s4, c64; a token has none
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
    return total


def _rounds(text: str, condition: _Computation | None) -> int | None:
    """How often a loop turns, if that is written anywhere."""
    if match := _TRIP_COUNT.search(text):
        return int(match[1])
    if condition is None or not condition.root:
        return None
    root = condition.instructions[condition.root]
    limit = condition.instructions.get(root.operands[-1]) if root.operands else None
    if root.opcode != "compare" or "direction=LT" not in root.text or limit is None:
        return None
    match = re.search(r" = s32\[\]\S* constant\((\d+)\)", limit.text)
    return int(match[1]) if match else None
