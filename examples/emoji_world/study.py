"""The paper's five ablations, and GradSPO, in the emoji world: each recipe with three seeds, and a table.

    python -m examples.emoji_world.study --workdir=runs/study            # goes on with the runs that are missing
    python -m examples.emoji_world.study --workdir=runs/study --table    # only writes table.md, of the runs so far

The seeds come in turn, so that a study that is not finished has all recipes of the first seeds. The plain judge is
trained here, too, before the first run that needs it. ``study_table.py`` says what the table's intervals are of.
"""

from __future__ import annotations

import copy
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import spm_tiny
from examples.emoji_world import study_flags, study_table
from spo_jax import cli, methods
from spo_jax.emoji.make_pairs import make_for
from spo_jax.errors import UserError, notice

CONFIG = config_flags.DEFINE_config_file("config", "configs/tiny.py", "The recipe.", lock_config=True)
ONLY = flags.DEFINE_multi_string("only", [], "Name of a run to make, may be given several times; all by default.")
flags.adopt_module_key_flags(study_flags)  # so that --help lists them

JUDGE = "plain_judge"  # its folder in the workdir


class Recipe(NamedTuple):
    """Keys that differ from the method's recipe, and the PickScore that the paper has for it (SD1.5), if it has one."""

    changes: dict[str, Any]
    paper: float | None


# Candidates of the method are drawn from t = 701 on (the first two of ten steps are plain), so it is the paper's range
# 0-750. The range 0-1000 has candidates from the first step on.
RECIPES = {
    study_table.METHOD: Recipe({}, 21.43),
    "next start: the worst": Recipe({"sampling.continuation": "lose"}, 19.36),
    "next start: the best": Recipe({"sampling.continuation": "win"}, 17.87),
    "told t = 0": Recipe({"scorer.step_aware": False}, 21.19),
    "random pair": Recipe({"pairs.kind": "random"}, 21.21),
    "t in 0-1000": Recipe({"sampling.num_plain_steps": 0}, 19.77),
    "t in 250-750": Recipe({"pairs.timesteps": (250, 750)}, 21.19),
    "t in 0-500": Recipe({"pairs.timesteps": (0, 500)}, 20.69),
    "k = 2": Recipe({"sampling.num_candidates": 2}, 21.37),
    "k = 8": Recipe({"sampling.num_candidates": 8}, 21.19),
    "GradSPO": Recipe({"loss.kind": "gradspo", "train.ema_decay": 0.9}, None),
    "plain judge": Recipe({"scorer.path": JUDGE}, 20.28),  # the path is completed by the workdir
}
SEEDS = (0, 1, 2)
RUNS = {f"{recipe}, seed {seed}": (recipe, seed) for seed in SEEDS for recipe in RECIPES}
# Of all runs alike. With this learning rate, the best of comparison.py's tries with the recipe's beta, half of the
# recipe's batches gain as much. Nobody looks at 36 times three sheets, and a checkpoint every few minutes is enough.
COMMON = {"train.learning_rate": 2e-4, "num_batches": 30, "validation.every": 0, "checkpoint.every": 20}


def main() -> None:
    """Makes the runs that are missing, and writes the table after each."""
    recipe, workdir = cli.config_of(CONFIG), cli.workdir_of(study_flags.WORKDIR)
    for name in ONLY.value:
        if name not in RUNS:
            raise UserError(f"--only: there is no run {name!r}; the runs are {', '.join(RUNS)}.")
    failed = []
    for name in [] if study_flags.TABLE.value else ONLY.value or RUNS:
        if (folder_of(workdir, name) / study_table.SUMMARY).is_file():
            continue
        began, processor = time.time(), time.process_time()
        try:
            if not make_run(recipe, name, workdir):
                notice("stopped; run the same command again to go on.")
                return
        except UserError as error:  # such as a loss that is not finite: the other runs can still be made
            failed.append(name)
            notice(f"{name}: {error}")
        jax.clear_caches()
        spent = f"{time.time() - began:.0f} seconds, {time.process_time() - processor:.0f} of a processor"
        notice(f"{name}: {spent}")
        write_table(workdir)
    write_table(workdir)
    if failed:
        raise UserError(f"These runs failed, for the reasons above: {'; '.join(failed)}.")


def folder_of(workdir: Path, name: str) -> Path:
    """The --workdir of a run."""
    return workdir / re.sub(r"[^a-z0-9]+", "_", name.lower())


def config_of_run(recipe: ConfigDict, name: str, workdir: Path) -> ConfigDict:
    """The config of a run: the recipe's with the run's seed and changes."""
    changed, seed = RUNS[name]
    changes = {"seed": seed, **COMMON, **RECIPES[changed].changes}
    if changes.get("scorer.path") == JUDGE:
        changes["scorer.path"] = str(workdir / JUDGE / "best")
    config = copy.deepcopy(recipe)
    config.update_from_flattened_dict(changes)
    return config


def make_run(recipe: ConfigDict, name: str, workdir: Path) -> bool:
    """Makes or finishes a run, and the plain judge if it needs it; False if SIGTERM has stopped it."""
    if RECIPES[RUNS[name][0]].changes.get("scorer.path") == JUDGE and not make_judge(workdir):
        return False
    return methods.train(config_of_run(recipe, name, workdir), folder_of(workdir, name)) is not None


def write_table(workdir: Path) -> None:
    """Writes ``table.md`` from the runs that are there."""
    folders = {recipe: [folder_of(workdir, f"{recipe}, seed {seed}") for seed in SEEDS] for recipe in RECIPES}
    study_table.write(workdir, folders, {name: recipe.paper for name, recipe in RECIPES.items()})


# ------------------------------------------------------------------------------------------------------ the plain judge
def make_judge(workdir: Path) -> bool:
    """Trains the preference model of clean images, without the time input; False if SIGTERM has stopped it."""
    if (workdir / JUDGE / study_table.SUMMARY).is_file():
        return True
    config = spm_tiny.get_config()
    config.scorer.step_aware, config.timesteps = False, (0, 1)
    config.data.train, config.data.validation = "emoji:pairs@train", "emoji:pairs@validation"
    make_for(config)
    return methods.train(config, workdir / JUDGE) is not None


if __name__ == "__main__":
    cli.run(main)
