"""SPO against Diffusion-DPO from the same base model and the same preference: what a gain costs each of them.

    python -m examples.emoji_world.comparison --workdir=runs/comparison            # goes on with what is missing
    python -m examples.emoji_world.comparison --workdir=runs/comparison --table    # only writes what there is

SPO asks the shipped preference model; Diffusion-DPO gets the pairs that this model was trained on. Each has as many
tries to choose learning rate and beta, on training captions; the chosen ones run with three seeds, and the true
preference of held-out captions is measured along the way. FLOPs are those of the programs that training runs, loops
multiplied out. ``comparison_table.py`` makes table and picture.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from configs import dpo_tiny, spm_tiny, tiny
from examples.emoji_world import comparison_table, study_flags
from spo_jax import cli, methods
from spo_jax.emoji.make_pairs import make_for
from spo_jax.errors import notice
from spo_jax.files import write_text
from spo_jax.formats.hub import local
from spo_jax.formats.json_files import read_json
from spo_jax.planning.estimate import estimate_program
from spo_jax.planning.targets import parse_target

flags.adopt_module_key_flags(study_flags)  # so that --help lists them

SEEDS = (0, 1, 2)
NUM_TRY_CAPTIONS = NUM_CAPTIONS = 100  # training captions that a try is measured on, held-out ones of a run
MOST_ALIGNMENT_LOST = 0.05  # of a try that may be chosen: a model that ignores the prompt is no better one


class Side(NamedTuple):
    """One of the two methods: its recipe, its tries, what makes a try and a run, and the programs of a step."""

    recipe: ConfigDict
    tries: list[dict[str, Any]]
    of_try: dict[str, Any]
    of_run: dict[str, Any]


def grid(rates: tuple[float, ...], betas: tuple[float, ...]) -> list[dict[str, Any]]:
    """Every learning rate with every beta."""
    return [{"train.learning_rate": rate, "loss.beta": beta} for rate in rates for beta in betas]


SIDES = {
    "SPO": Side(
        tiny.get_config(),
        grid((2e-4, 4e-4, 8e-4), (3.0, 10.0)),
        {"num_batches": 30},
        {"num_batches": 60, "evaluation.every": 5},
    ),
    "Diffusion-DPO": Side(
        dpo_tiny.get_config(),
        grid((3e-3, 1e-2, 3e-2), (300.0, 1000.0)),
        {"num_steps": 150},
        {"num_steps": 450, "evaluation.every": 30},
    ),
}
COMMON = {"validation.every": 0, "evaluation.metrics": ("colorfulness", "alignment_top1")}


def main() -> None:
    """Makes what is missing, and writes table and picture after each run."""
    workdir = cli.workdir_of(study_flags.WORKDIR)
    if not study_flags.TABLE.value:
        captions = training_captions(workdir)
        make_for(dpo_tiny.get_config())
        for name, config, folder in missing(workdir, captions):
            if methods.train(config, folder) is None:
                notice("stopped; run the same command again to go on.")
                return
            jax.clear_caches()
            notice(f"{name} is done.")
            write(workdir)
    write(workdir)


def training_captions(workdir: Path) -> Path:
    """A file of captions to choose settings on: some that SPO is trained on, spread over its file."""
    lines = local(tiny.get_config().prompts).read_text(encoding="utf-8").splitlines()
    path = workdir / "training_captions.txt"
    write_text(path, "\n".join(lines[:: len(lines) // NUM_TRY_CAPTIONS][:NUM_TRY_CAPTIONS]) + "\n")
    return path


def missing(workdir: Path, captions: Path) -> Iterator[tuple[str, ConfigDict, Path]]:
    """Name, config and folder of each run that is to be made, tries first; a run is there when its summary is."""
    for name, side in SIDES.items():
        for number, setting in enumerate(side.tries):
            shown = {"evaluation.prompts": str(captions), "evaluation.num_prompts": NUM_TRY_CAPTIONS}
            folder = try_folder(workdir, name, number)
            if not (folder / "summary.json").is_file():
                yield f"{name}, try {number}", changed(side.recipe, COMMON, side.of_try, shown, setting), folder
    for seed in SEEDS:
        for name, side in SIDES.items():
            folder = run_folder(workdir, name, seed)
            if not (folder / "summary.json").is_file():
                setting = side.tries[best_try(workdir, name)]
                more = {"seed": seed, "evaluation.num_prompts": NUM_CAPTIONS, "evaluation.batch_size": 50}
                yield f"{name}, seed {seed}", changed(side.recipe, COMMON, side.of_run, setting, more), folder


def changed(recipe: ConfigDict, *changes: dict[str, Any]) -> ConfigDict:
    """The recipe with the changes, one after the other."""
    config = copy.deepcopy(recipe)
    for change in changes:
        config.update_from_flattened_dict(change)
    return config


def try_folder(workdir: Path, name: str, number: int) -> Path:
    """The --workdir of a try."""
    return workdir / f"{_slug(name)}_try_{number}"


def run_folder(workdir: Path, name: str, seed: int) -> Path:
    """The --workdir of a run."""
    return workdir / f"{_slug(name)}_seed_{seed}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def best_try(workdir: Path, name: str) -> int:
    """The number of the try with the most true preference, of those that keep to the prompts."""
    summaries = [read_json(try_folder(workdir, name, i) / "summary.json") for i in range(len(SIDES[name].tries))]

    def gain(number: int) -> tuple[bool, float]:
        base, tuned = summaries[number]["base"], summaries[number]["tuned"]
        keeps = base["alignment_top1"] - tuned["alignment_top1"] <= MOST_ALIGNMENT_LOST
        return keeps, tuned["colorfulness"] - base["colorfulness"]

    return max(range(len(summaries)), key=gain)


def flops_of(config: ConfigDict) -> dict[str, float]:
    """FLOPs of one call of each program of training, on one device."""
    names = {"spo": ("encode", "pool", "score", "update")}.get(config.method, ("update",))
    return {name: estimate_program(config, parse_target("cpu"), name)[0] for name in names}


def write(workdir: Path) -> None:
    """Writes ``comparison.json``, ``comparison.md`` and ``comparison.svg`` from the runs that are there."""
    found = {}
    for name, side in SIDES.items():
        tries = [try_folder(workdir, name, i) for i in range(len(side.tries))]
        runs = [run_folder(workdir, name, seed) for seed in SEEDS]
        found[name] = comparison_table.Found(side.recipe.method, side.tries, tries, runs, flops_of(side.recipe))
    judge = spm_tiny.get_config()
    judge_flops = judge.num_steps * flops_of(judge)["update"]
    comparison_table.write(workdir, found, judge_flops)


if __name__ == "__main__":
    cli.run(main)
