"""The figures of ``docs/emoji.md``: the tiny recipe and two ablations of the paper, with three seeds each.

    python -m examples.emoji_world.study --config=configs/tiny.py --workdir=runs/study

Each run is resumable and lives in a folder of its own; ``table.md`` is written anew after each of them.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import config_flags

from spo_jax import cli, methods
from spo_jax.errors import UserError
from spo_jax.formats.json_files import read_json

CONFIG = config_flags.DEFINE_config_file("config", "configs/tiny.py", "The recipe.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs and table.md.")
ONLY = flags.DEFINE_multi_string("only", [], "Name of a run to make, may be given several times; all by default.")

RECIPES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "continue from the winner": {"sampling.continuation": "win"},
    "told t = 0 always": {"scorer.step_aware": False},
}
SEEDS = (0, 1, 2)
RUNS = {f"{name}, seed {seed}": {"seed": seed, **changes} for name, changes in RECIPES.items() for seed in SEEDS}
COLUMNS = {
    "win rate": lambda s: s["win_rate"]["colorfulness"],
    "win rate by score": lambda s: s["win_rate"]["preference_score"],
    "colourfulness, base": lambda s: s["base"]["colorfulness"],
    "tuned": lambda s: s["tuned"]["colorfulness"],
    "gain in base std": lambda s: (
        (s["tuned"]["colorfulness"] - s["base"]["colorfulness"]) / s["base_std"]["colorfulness"]
    ),
    "alignment, base": lambda s: s["base"]["alignment_top1"],
    "tuned ": lambda s: s["tuned"]["alignment_top1"],
    "seconds": lambda s: s["seconds"],
}


def main() -> None:
    """Makes the runs that are missing and writes the table."""
    recipe, workdir = cli.config_of(CONFIG), cli.workdir_of(WORKDIR)
    for name in ONLY.value or RUNS:
        if name not in RUNS:
            raise UserError(f"--only: there is no run {name!r}; the runs are {', '.join(RUNS)}.")
        folder = folder_of(workdir, name)
        if not (folder / "summary.json").is_file():
            config = copy.deepcopy(recipe)
            config.update_from_flattened_dict(RUNS[name])
            methods.train(config, folder)
        write_table(workdir)


def folder_of(workdir: Path, name: str) -> Path:
    """The --workdir of a run."""
    return workdir / re.sub(r"[^a-z0-9]+", "_", name)


def write_table(workdir: Path) -> None:
    """Writes ``table.md`` from the summaries that are there; mean and deviation where a recipe has all its seeds."""
    lines = ["| run | " + " | ".join(c.strip() for c in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for recipe in RECIPES:
        names = [f"{recipe}, seed {seed}" for seed in SEEDS]
        found = {name: folder_of(workdir, name) / "summary.json" for name in names}
        rows = {
            name: [value(read_json(path)) for value in COLUMNS.values()]
            for name, path in found.items()
            if path.is_file()
        }
        lines += [f"| {name} | " + " | ".join(f"{v:.3g}" for v in values) + " |" for name, values in rows.items()]
        if len(rows) == len(SEEDS):
            values = np.array(list(rows.values()))
            spread = zip(values.mean(axis=0), values.std(axis=0, ddof=1), strict=True)
            lines.append(f"| **{recipe}** | " + " | ".join(f"{m:.3g} ± {s:.2g}" for m, s in spread) + " |")
    (workdir / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
