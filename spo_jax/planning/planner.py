"""Whether a run fits a target: exactly, by compiling its programs, or by an estimate."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from ml_collections import ConfigDict

from spo_jax import methods
from spo_jax.distributed.mesh import mesh_sizes
from spo_jax.errors import UserError
from spo_jax.planning.compile import compile_program, versions
from spo_jax.planning.estimate import abstract_run, estimate_program, resident_bytes
from spo_jax.planning.remedies import search
from spo_jax.planning.report import Need
from spo_jax.planning.targets import GIB, Target, check_installed
from spo_jax.runs.assembly import Assembly


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs on each device: what is resident, in bytes by what it is, and each program's need."""

    run: Assembly
    resident: dict[str, int]
    needs: list[Need]
    exact: bool

    @property
    def fits(self) -> bool:
        """Whether every program does."""
        return all(need.fits for need in self.needs)


def check(config: ConfigDict, target: Target) -> None:
    """Raises UserError for a config that no run can use, or not on so many devices."""
    methods.config_of(config.method).check(config)
    count = target.num_devices
    mesh_sizes(config.mesh.data, config.mesh.fsdp, count)
    keys = ["prompts_per_batch", "train.minibatch_size"]
    if config.method == "spm":
        keys = ["train.batch_size", "validation.batch_size", "chunk"]
    for key in keys:
        size = _value(config, key)
        if size % count:
            raise UserError(
                f"config.{key} = {size} cannot be split over the {count} devices of {target.name}; it counts for all "
                f"devices, in the recipes for 4: with the same for each it is --config.{key}={size * count // 4}."
            )


def estimate(config: ConfigDict, target: Target) -> Plan:
    """The plan without compiling."""
    run = abstract_run(config, target)
    resident = resident_bytes(run)
    needs = []
    for name in run.programs:
        flops, extra, own = estimate_program(config, target, name)
        needs.append(_need(name, flops, extra + own, resident, target))
    return Plan(run, resident, needs, exact=False)


def compile_all(config: ConfigDict, target: Target) -> Plan:
    """The plan from the compiled programs; UserError if the target's compiler is not installed."""
    check_installed(target)
    run = abstract_run(config, target)
    resident = resident_bytes(run)
    needs = []
    for name in run.programs:
        print(f"spo_jax: compiling the program {name!r} for {target.name} ...", file=sys.stderr, flush=True)
        answer = compile_program(config, target.name, name)
        flops, _, _ = estimate_program(config, target, name)
        own = answer.extra + answer.temp + answer.output + answer.code
        if answer.status == "compiled":
            need = _need(name, flops, own, resident, target)
            need = dataclasses.replace(need, traffic=answer.traffic, seconds=answer.seconds)
        elif answer.status == "too large":
            # What the compiler says it needs has the arguments in it, and not what is resident beside them.
            need = Need(name, flops, own, answer.temp, False, seconds=answer.seconds)
        else:
            need = Need(name, flops, 0, 0, False, problem=f"not known: {answer.message}")
        needs.append(need)
    return Plan(run, resident, needs, exact=True)


def smaller(config: ConfigDict, target: Target, *, exact: bool) -> tuple[Plan, dict[str, Any]] | None:
    """A setting that fits, and the keys of it that differ; found by estimates, and compiled if ``exact``."""
    margin = 1.0
    while margin > 0.7:

        def worst(setting: ConfigDict, margin: float = margin) -> tuple[str, bool, int]:
            plan = estimate(setting, target)
            need = max(plan.needs, key=lambda need: need.peak)
            limit = target.limit or need.peak + 1
            return need.program, need.peak <= margin * limit, 100 * sum(plan.resident.values()) // limit

        found = search(config, target.num_devices, worst)
        if found is None:
            return None
        setting, changed = found
        plan = compile_all(setting, target) if exact else estimate(setting, target)
        if plan.fits:
            return plan, changed
        margin -= 0.08  # the estimate was too low here
    return None


def heading(config: ConfigDict, target: Target, *, exact: bool) -> str:
    """What is planned for what, and how."""
    data, fsdp = mesh_sizes(config.mesh.data, config.mesh.fsdp, target.num_devices)
    count = target.num_devices
    devices = f"{count} device{'s' if count > 1 else ''}"
    memory = f" of {target.limit / GIB:.2f} GiB" if target.limit else ""
    how = f"compiled ({versions(target.platform)})" if exact else "estimated"
    if config.method == "spo":
        kind = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "full fine-tuning"
        share = f"{config.prompts_per_batch // count} prompts and {config.train.minibatch_size // count} pairs"
    else:
        kind, share = "preference model", f"{config.train.batch_size // count} pairs"
    return (
        f"{config.model}: {kind}, {how}\n"
        f"{target.name}: {devices}{memory}, mesh data {data} x fsdp {fsdp}, {share} on each"
    )


def verdict(plan: Plan, target: Target) -> str:
    """One sentence: it fits, or what does not."""
    worst = max(plan.needs, key=lambda need: (not need.fits, need.peak))
    if worst.problem:
        return f"Not known: the program {worst.program!r} could not be compiled ({worst.problem})."
    need = f"{worst.program!r} needs {worst.peak / GIB:.2f}"
    if target.limit is None:
        return f"The program {need} GiB, the most of all; {target.name} has no fixed limit to compare with."
    limit = f"{target.limit / GIB:.2f} GiB"
    return (
        f"Fits: the program {need} of {limit}, the most of all." if plan.fits else f"Does not fit: {need} of {limit}."
    )


def _need(name: str, flops: float, own: int, resident: dict[str, int], target: Target) -> Need:
    peak = sum(resident.values()) + own
    return Need(name, flops, own, peak, target.limit is None or peak <= target.limit)


def _value(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
