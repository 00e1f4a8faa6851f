"""The table of docs/memory.md: the recipes on the usual devices, compiled for them, and estimated.

    python -m benchmarks.memory_table             # hours; goes on where it stopped
    python -m benchmarks.memory_table --only=v6e  # the rows of one kind of device
    python -m benchmarks.memory_table --estimates # of what was compiled before, anew: half an hour

Needs requirements-plan.txt. Results are kept in benchmarks/memory_table.json; a row that is there is not made again.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from spo_jax import cli
from spo_jax.planning.chips import GIB
from spo_jax.planning.compile import compile_program, versions
from spo_jax.planning.estimate import abstract_run, estimate_program, resident_bytes
from spo_jax.planning.planner import check, overrides
from spo_jax.planning.targets import parse_target

ONLY = flags.DEFINE_string("only", "", "Part of a target's name: only its rows are made.")
ESTIMATES = flags.DEFINE_boolean("estimates", False, "Nothing is compiled; what was is estimated again.")

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
# The others are small.
PROGRAMS = ("pool", "update", "evaluation")


Entry = dict[str, Any]  # what is kept of a program, as JSON


class Cell(NamedTuple):
    """A recipe on a target, with what is set otherwise; batch sizes are the recipe's share of each device."""

    name: str
    config: str
    target: str
    changes: dict[str, object] = {}  # noqa: RUF012  (a NamedTuple's default; nothing changes it)


FULL = {"lora.rank": 0}
ADAFACTOR = {**FULL, "train.optimizer": "adafactor"}
EIGHT = {"mesh.data": 1, "mesh.fsdp": 8}
CELLS = (
    Cell("SD1.5, LoRA", "sd15", "v5e:2x2"),
    Cell("SDXL, LoRA, fsdp 8", "sdxl", "v5e:2x4", EIGHT),
    Cell("SDXL, LoRA", "sdxl", "v6e:2x2"),
    Cell("SDXL, LoRA", "sdxl", "h100:4"),
    Cell("SD1.5, LoRA", "sd15", "h100:4"),
    Cell("SD1.5, LoRA", "sd15", "v6e:2x2"),
    Cell("SD1.5, all weights, fsdp 8", "sd15", "v5e:2x4", {**FULL, **EIGHT}),
    Cell("SD1.5, all weights", "sd15", "v6e:2x2", FULL),
    Cell("SD1.5, all weights", "sd15", "h100:4", FULL),
    Cell("SDXL, all weights, fsdp 4", "sdxl", "h100:4", {**FULL, "mesh.data": 1, "mesh.fsdp": 4}),
    Cell("SDXL, all weights, fsdp 8", "sdxl", "v6e:2x4", {**FULL, **EIGHT}),
    Cell("SDXL, all weights, fsdp 8", "sdxl", "v5e:2x4", {**FULL, **EIGHT}),
)


def config_of(cell: Cell) -> ConfigDict:
    """The recipe with the same share for each device, whatever their number."""
    config = importlib.import_module(f"configs.{cell.config}").get_config()
    count = parse_target(cell.target).num_devices
    config.prompts_per_batch = config.prompts_per_batch * count // 4
    config.train.minibatch_size = config.train.minibatch_size * count // 4
    config.update_from_flattened_dict(cell.changes)
    return config


def compiled(cell: Cell, program: str) -> Entry:
    """One program of a cell as the compiler has it; bytes on each device."""
    config, target = config_of(cell), parse_target(cell.target)
    check(config, target)
    answer = compile_program(config, target.name, program)
    exact = answer.own
    if answer.status == "compiled":
        exact += sum(resident_bytes(abstract_run(config, target)).values())
    return {
        "status": answer.status,
        "message": answer.message,
        "exact": exact,
        "collectives": answer.traffic and answer.traffic.bytes,
        "seconds": round(answer.seconds),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(target.platform),
    }


def estimated(cell: Cell, program: str) -> Entry:
    """One program of a cell as it is estimated; bytes on each device."""
    config, target = config_of(cell), parse_target(cell.target)
    flops, extra, own = estimate_program(config, target, program)
    return {"estimate": sum(resident_bytes(abstract_run(config, target)).values()) + extra + own, "flops": flops}


def rows(results: dict[str, Entry]) -> list[str]:
    """The table in Markdown."""
    lines = [
        "| recipe | devices | limit | pool | update | evaluation | fits | compiled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in CELLS:
        found = {program: results.get(key(cell, program)) for program in PROGRAMS}
        if not any(found.values()):
            continue
        limit = parse_target(cell.target).limit or 0
        cells = [_entry(found[program]) for program in PROGRAMS]
        known = [entry for entry in found.values() if entry]
        compiled = [entry for entry in known if entry["status"] != "failed"]
        fits = all(entry["status"] == "compiled" and entry["exact"] <= limit for entry in compiled)
        word = "no" if not fits else "yes" if len(compiled) == len(PROGRAMS) else "so far"
        made = f"{max(e['date'] for e in known)}, {known[0]['versions']}"
        row = [cell.name, cell.target, f"{limit / GIB:.1f}", *cells, word, made]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def _entry(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    if entry["status"] == "failed":
        return "the compiler fails"
    more = "more than " if entry["status"] == "too large" and not entry["exact"] else ""
    off = f" ({entry['estimate'] / entry['exact'] - 1:+.0%})" if entry["status"] == "compiled" else ""
    return f"{more}{entry['exact'] / GIB:.1f}{off}"


def key(cell: Cell, program: str) -> str:
    """What a result is kept by."""
    return f"{cell.config} {overrides(cell.changes)} {cell.target} {program}".replace("  ", " ")


def write_page(results: dict[str, Entry]) -> None:
    """Puts the table between its marks in docs/memory.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text("\n".join([before + BEGIN, *rows(results), END + after]), encoding="utf-8")


def main() -> None:
    """Makes what is missing, or estimates what is not, one program after the other."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for program in PROGRAMS[:2], PROGRAMS[2:]:
        for cell in CELLS:
            for name in program:
                known = results.get(key(cell, name))
                if bool(known) != ESTIMATES.value or ONLY.value not in cell.target:
                    continue
                result = (known or compiled(cell, name)) | estimated(cell, name)
                results[key(cell, name)] = result
                print(f"{key(cell, name)}: {result}", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                write_page(results)


if __name__ == "__main__":
    cli.run(main)
