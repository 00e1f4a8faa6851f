"""Whether a run fits a target, exactly (by compiling its programs) or by an estimate; if not, a setting that does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from ml_collections import ConfigDict

from spo_jax import methods
from spo_jax.distributed.mesh import mesh_sizes, round_up
from spo_jax.distributed.pieces import piece_size
from spo_jax.errors import UserError
from spo_jax.kernels.attention import check_kind
from spo_jax.planning.chips import GIB
from spo_jax.planning.collectives import Traffic
from spo_jax.planning.compile import compile_program, versions
from spo_jax.planning.estimate import abstract_run, batches, estimate_program, resident_bytes
from spo_jax.planning.shapes import num_parameters
from spo_jax.planning.targets import Target, check_installed
from spo_jax.runs.assembly import Assembly

_MAX_TURNS = 40
_LARGE_REST = 75  # percent; with so little left for programs, weights are split before anything else is given up
# What is learned from at a time, by the key that says how much of it.
_LEARNED = {"prompts_per_batch": "prompts", "train.minibatch_size": "pairs", "train.batch_size": "pairs"}
Turn = dict[str, object]  # keys of the config and their values


@dataclasses.dataclass(frozen=True)
class Need:
    """What one program needs on each device."""

    program: str
    flops: float  # of matrix products and convolutions, all rounds of its loops
    own: int  # bytes beside what is resident: arguments, temporary arrays, results, code
    peak: int  # bytes in all; of a program that the compiler gave up, at least that
    fits: bool
    traffic: Traffic | None = None  # None if it was not compiled, or its text cannot be read
    seconds: float | None = None  # that compiling took; None if it was not compiled
    problem: str = ""  # what the compiler said, if it gave no numbers


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on each device: what is resident, in bytes by what it is, and each program's need."""

    run: Assembly
    resident: dict[str, int]
    needs: Sequence[Need]

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(need.fits for need in self.needs)


def check(config: ConfigDict, target: Target) -> None:
    """Raises UserError for a config that no run can use, or not on so many devices."""
    methods.check(config)  # what it says of devices, this says better below
    count = target.num_devices
    mesh_sizes(config.mesh.data, config.mesh.fsdp, count)
    check_kind(config.attention, target.platform, config.dtype)
    for key, size in batches(config).items():
        if size % count:
            raise UserError(
                f"config.{key} = {size} cannot be split over the {count} devices of {target.name}; it counts for all "
                f"devices, in the recipes for 4: with the same for each it is --config.{key}={size * count // 4}."
            )


def make_plan(config: ConfigDict, target: Target, *, exact: bool) -> Plan:
    """Estimates every program or, if ``exact``, compiles it.

    Raises:
      UserError: the target's compiler is needed and not installed, or a model has no config.
    """
    if exact:
        check_installed(target)
    run, need = abstract_run(config, target), _compiled if exact else _estimated
    resident = resident_bytes(run)
    return Plan(run, resident, [need(config, target, name, sum(resident.values())) for name in run.programs])


def _estimated(config: ConfigDict, target: Target, name: str, stays: int) -> Need:
    flops, *own = estimate_program(config, target, name)
    peak = stays + sum(own)
    return Need(name, flops, sum(own), peak, target.limit is None or peak <= target.limit)


def _compiled(config: ConfigDict, target: Target, name: str, stays: int) -> Need:
    print(f"spo_jax: compiling the program {name!r} for {target.name} ...", file=sys.stderr, flush=True)
    answer = compile_program(config, target.name, name)
    flops, _, _ = estimate_program(config, target, name)
    if answer.status == "failed":
        return Need(name, flops, 0, 0, False, problem=f"not known: {answer.message}")
    # Of a program that is too large the compiler says what it needs in all, with arguments.
    peak = answer.own + (stays if answer.status == "compiled" else 0)
    fits = answer.status == "compiled" and (target.limit is None or peak <= target.limit)
    return Need(name, flops, answer.own, peak, fits, answer.traffic, answer.seconds)


# ------------------------------------------------------------------------------------------------- what a plan says
def heading(config: ConfigDict, target: Target, *, exact: bool) -> str:
    """What is planned for what, and how."""
    data, fsdp = mesh_sizes(config.mesh.data, config.mesh.fsdp, target.num_devices)
    count = target.num_devices
    devices = f"{count} device{'s' if count > 1 else ''}{_limit(target)}"
    how = f"compiled ({versions(target.platform)})" if exact else "estimated"
    if "lora" not in config:
        kind = "preference model"
    else:
        kind = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "full fine-tuning"
    sizes = batches(config)
    share = " and ".join(f"{sizes[key] // count} {what}" for key, what in _LEARNED.items() if key in sizes)
    return f"{config.model}: {kind}, {how}\n{target.name}: {devices}, mesh data {data} x fsdp {fsdp}, {share} on each"


def table(plan: Plan, target: Target) -> str:
    """The plan as text: what stays on a device, then a row for each program."""
    rows = [["stays on each device", "parameters", "GiB"]]
    for name, size in plan.resident.items():
        if size:
            rows.append([name, f"{num_parameters(plan.run.resident[name]) / 1e6:,.1f} M", _gib(size)])
    rows.append(["together", "", _gib(sum(plan.resident.values()))])
    programs = [["program", "own GiB", f"peak GiB{_limit(target)}", "TFLOP", "collectives", "compiled in"]]
    for need in plan.needs:
        share = f" ({100 * need.peak / target.limit:.0f} %)" if target.limit else ""
        peak = need.problem or f"{_gib(need.peak)}{share}{'' if need.fits else ', does not fit'}"
        seconds = "-" if need.seconds is None else f"{need.seconds:.0f} s"
        flops, traffic = f"{need.flops / 1e12:,.2f}", _words(need.traffic)
        programs.append([need.program, _gib(need.own), peak, flops, traffic, seconds])
    return f"{aligned(rows)}\n\n{aligned(programs)}"


def verdict(plan: Plan, target: Target) -> str:
    """One sentence: it fits, or what does not."""
    worst = max(plan.needs, key=lambda need: (not need.fits, need.peak))
    if worst.problem:
        return f"Not known: the program {worst.program!r} could not be compiled ({worst.problem})."
    need = f"{worst.program!r} needs {_gib(worst.peak)}"
    if target.limit is None:
        return f"The program {need} GiB, the most of all; {target.name} has no fixed limit to compare with."
    need += f" of {_gib(target.limit)} GiB"
    return f"Fits: the program {need}, the most of all." if plan.fits else f"Does not fit: {need}."


def overrides(changed: Mapping[str, object]) -> str:
    """Keys and values as they are written on a command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changed.items())


def _words(traffic: Traffic | None) -> str:
    if traffic is None:
        return "-"
    words = [f"{count:,} {kind} {_size(traffic.bytes[kind])}" for kind, count in traffic.counts.items()]
    return ", ".join(words + ["and loops of unknown length"] * bool(traffic.unknown_loops)) or "none"


def _size(count: int) -> str:
    units = (f"{count / size:.1f} {unit}" for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= size)
    return next(units, f"{count} B")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _limit(target: Target) -> str:
    return f" of {_gib(target.limit)} GiB" if target.limit else ""


def aligned(rows: list[list[str]]) -> str:
    """A table as text, its columns one under the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# ------------------------------------------------------------------------------------------ a smaller setting that fits
def smaller(config: ConfigDict, target: Target, *, exact: bool) -> tuple[Plan, Turn] | None:
    """A setting that fits, and the keys of it that differ; found by estimates, and compiled if ``exact``."""
    for part in (1.0, 0.92, 0.84, 0.76):  # of the limit: less where the estimate was too low

        def worst(setting: ConfigDict, part: float = part) -> tuple[str, bool, int]:
            plan = make_plan(setting, target, exact=False)
            need = max(plan.needs, key=lambda need: need.peak)
            limit = target.limit or need.peak + 1
            return need.program, need.peak <= part * limit, 100 * sum(plan.resident.values()) // limit

        if (found := search(config, target.num_devices, worst)) is None:
            return None
        plan = make_plan(found[0], target, exact=exact)
        if plan.fits:
            return plan, found[1]
    return None


def search(
    config: ConfigDict, num_devices: int, worst: Callable[[ConfigDict], tuple[str, bool, int]]
) -> tuple[ConfigDict, Turn] | None:
    """Turns knobs until everything fits: a config that does and the keys that differ; None if no knob is left.

    ``worst(config)`` tells of the program that needs most: its name, whether it fits, percent of the limit that is
    resident.
    """
    setting = config.copy_and_resolve_references()
    changed: Turn = {}
    for _ in range(_MAX_TURNS):
        program, fits, resident_share = worst(setting)
        if fits:
            return setting, changed
        if (turn := next(_turns(setting, program, num_devices, resident_share), None)) is None:
            return None
        with setting.unlocked():
            setting.update_from_flattened_dict(turn)
        changed |= turn
    return None


def _turns(config: ConfigDict, program: str, count: int, resident_share: int) -> Iterator[Turn]:
    """Possible next turns for a program; those that cost the least time, and then those that learn the same, first."""
    split: Turn = {"mesh.fsdp": count, "mesh.data": 1}
    can_split = config.mesh.fsdp not in (-1, count) and count > 1
    if can_split and resident_share > _LARGE_REST:
        yield split
    yield from _TURNS[config.method](config, program, count)
    if can_split:
        yield split


def _spo_turns(config: ConfigDict, program: str, count: int) -> Iterator[Turn]:
    train = config.train
    images = {
        "score": config.prompts_per_batch * config.sampling.num_candidates,
        "evaluation": round_up(config.evaluation.batch_size, count),
    }
    if program in images:
        size = piece_size(images[program], count, config.scorer.chunk) // count
        if size > 1:
            yield {"scorer.chunk": piece_size(images[program], count, size - 1) // count}
    yield from _tuning_turns(config, program, count)
    if program == "update" and train.minibatch_size > count and (half := _smaller(train.minibatch_size, count)):
        more = train.accumulation_steps * train.minibatch_size // half
        yield {"train.minibatch_size": half, "train.accumulation_steps": more}
    if program in ("encode", "pool", "score") and (half := _smaller(config.prompts_per_batch, count)):
        yield {"prompts_per_batch": half, "num_batches": config.num_batches * config.prompts_per_batch // half}


def _tuning_turns(config: ConfigDict, program: str, count: int) -> Iterator[Turn]:
    """Those of every method that tunes a UNet."""
    if program == "update" and not config.remat:
        yield {"remat": True}
    if program != "encode" and not config.get("offload", True):
        yield {"offload": True}
    if program == "evaluation" and config.evaluation.batch_size > count:
        yield {"evaluation.batch_size": config.evaluation.batch_size // 2}


def _spm_turns(config: ConfigDict, program: str, count: int) -> Iterator[Turn]:
    train, validation = config.train, config.validation
    if program == "update":
        if not config.remat:
            yield {"remat": True}
        chunk = config.chunk or train.batch_size
        pieces = [n for n in range(count, chunk, count) if train.batch_size % n == validation.batch_size % n == 0]
        if pieces:
            yield {"chunk": pieces[-1]}
        if half := _smaller(train.batch_size, count):
            more = train.accumulation_steps * train.batch_size // half
            yield {"train.batch_size": half, "train.accumulation_steps": more, "chunk": min(config.chunk, half)}
    elif half := _smaller(validation.batch_size, count):
        yield {"validation.batch_size": half, "chunk": min(config.chunk, half)}


def _dpo_turns(config: ConfigDict, program: str, count: int) -> Iterator[Turn]:
    train, validation = config.train, config.validation
    yield from _tuning_turns(config, program, count)
    if program == "update" and (half := _smaller(train.batch_size, count)):
        yield {
            "train.batch_size": half,
            "train.accumulation_steps": train.accumulation_steps * train.batch_size // half,
        }
    if program == "errors" and (half := _smaller(validation.batch_size, count)):
        yield {"validation.batch_size": half}


_TURNS = {"spo": _spo_turns, "dpo": _dpo_turns, "spm": _spm_turns}  # by method


def _smaller(size: int, count: int) -> int | None:
    """The largest divisor below a global batch size that ``count`` devices can split."""
    return next((n for n in range(size - 1, 0, -1) if size % n == 0 and n % count == 0), None)
