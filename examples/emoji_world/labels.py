"""How many labels buy how much: adapters from few and many pairs of the emoji world, two learning rates, two seeds.

    python -m examples.emoji_world.labels --workdir=runs/labels            # goes on with the runs that are missing
    python -m examples.emoji_world.labels --workdir=runs/labels --table    # only writes table.md, of the runs so far

A label is the choice of one simulated person, as somebody makes it on the labelling page; a pair has another caption
than the others while there are captions left. Every run takes as many steps, so few pairs are seen more often, and the
same learning rate takes a model further: gain alone says little, what it costs in alignment has to stand beside it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import dpo_tiny
from examples.emoji_world import study_flags
from spo_jax import cli, methods
from spo_jax.data.builder import INFO, write_split
from spo_jax.data.preferences import open_pairs
from spo_jax.data.records import Record
from spo_jax.emoji.make_pairs import make_for
from spo_jax.errors import notice
from spo_jax.files import write_text
from spo_jax.formats.json_files import read_json

flags.adopt_module_key_flags(study_flags)  # so that --help lists them

NUMBERS = (15, 60, 240, 960)
RATES = (3e-4, 1e-3)  # that of docs/own_pairs.md, and the recipe's
SEEDS = (0, 1)
CHANGES = {"validation.num_prompts": 1, "validation.every": 200, "checkpoint.every": 100}


class Run(NamedTuple):
    """A number of labels, the learning rate, and the seed of labels and training."""

    number: int
    rate: float
    seed: int


RUNS = [Run(number, rate, seed) for seed in SEEDS for rate in RATES for number in NUMBERS]


def main() -> None:
    """Makes the runs that are missing, and writes the table after each."""
    workdir, recipe = cli.workdir_of(study_flags.WORKDIR), dpo_tiny.get_config()
    if not study_flags.TABLE.value:
        make_for(recipe)
        for run in RUNS:
            folder = folder_of(workdir, run)
            if not (folder / "summary.json").is_file():
                if methods.train(config_of(recipe, workdir, run), folder) is None:
                    notice("stopped; run the same command again to go on.")
                    return
                jax.clear_caches()
                write_table(workdir)
    write_table(workdir)


def folder_of(workdir: Path, run: Run) -> Path:
    """The --workdir of a run."""
    return workdir / f"labels_{run.number}_rate_{run.rate:g}_seed_{run.seed}"


def config_of(recipe: ConfigDict, workdir: Path, run: Run) -> ConfigDict:
    """The recipe on the run's pairs, which are made if they are not there."""
    config = copy.deepcopy(recipe)
    changes = {"seed": run.seed, "train.learning_rate": run.rate, "data.train": pairs_of(workdir, run.number, run.seed)}
    config.update_from_flattened_dict({**CHANGES, **changes})
    return config


def pairs_of(workdir: Path, number: int, seed: int) -> str:
    """So many pairs, each with the choice of one person, as FOLDER@SPLIT; made if they are not there."""
    folder = workdir / f"pairs_{number}_seed_{seed}"
    if not (folder / INFO).is_file():
        write_split(folder, "train", labelled(number, seed))
    return f"{folder}@train"


def labelled(number: int, seed: int) -> Iterator[Record]:
    """Pairs of the emoji world in random order, at first one a caption; each is labelled by one person."""
    records = open_pairs("emoji:pairs@train")
    generator = np.random.default_rng([seed, 11])
    order, seen, later = generator.permutation(len(records)), set(), []
    chosen: list[int] = []
    for place in order:
        if len(chosen) == number:
            break
        caption = records[int(place)]["caption"]
        (later if caption in seen else chosen).append(int(place))
        seen.add(caption)
    for place in (chosen + later)[:number]:
        record = records[place]
        first = float(generator.random() < record["label_0"])
        yield {**record, "label_0": first, "label_1": 1.0 - first}


def write_table(workdir: Path) -> None:
    """Writes ``table.md``: of each number of labels and learning rate the means over the seeds, and their range."""
    head = "| labels | learning rate | seeds | gain in base std | win rate | alignment lost | held-out accuracy |"
    lines = [head, "|---" * 7 + "|"]
    for number, rate in itertools.product(NUMBERS, RATES):
        folders = [folder_of(workdir, Run(number, rate, seed)) for seed in SEEDS]
        rows = [row_of(read_json(path)) for f in folders if (path := f / "summary.json").is_file()]
        if rows:
            columns = [[row[key] for row in rows] for key in ("gain", "wins", "lost", "accuracy")]
            cells = [f"{np.mean(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in columns]
            lines.append(f"| {number} | {rate:g} | {len(rows)} | {' | '.join(cells)} |")
    write_text(workdir / "table.md", "\n".join(lines) + "\n")


def row_of(summary: dict[str, Any]) -> dict[str, float]:
    """What the table shows of a run."""
    base, tuned, accuracy = summary["base"], summary["tuned"], summary["held_out_accuracy"]
    return {
        "gain": (tuned["colorfulness"] - base["colorfulness"]) / summary["base_std"]["colorfulness"],
        "wins": summary["win_rate"]["colorfulness"],
        "lost": base["alignment_top1"] - tuned["alignment_top1"],
        "accuracy": accuracy[max(accuracy, key=int)]["accuracy"],
    }


if __name__ == "__main__":
    cli.run(main)
