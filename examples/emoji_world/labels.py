"""How many labels buy how much: adapters from few and many pairs of the emoji world, with three seeds each.

    python -m examples.emoji_world.labels --workdir=runs/labels            # goes on with the runs that are missing
    python -m examples.emoji_world.labels --workdir=runs/labels --table    # only writes table.md, of the runs so far

A label is the choice of one simulated person, as somebody makes it on the labelling page; a pair has another caption
than the others while there are captions left. Every run takes as many steps, so few pairs are seen more often.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import dpo_tiny
from spo_jax import cli, methods
from spo_jax.data.builder import INFO, write_split
from spo_jax.data.preferences import open_pairs
from spo_jax.data.records import Record
from spo_jax.emoji.make_pairs import make_for
from spo_jax.errors import notice
from spo_jax.files import write_text
from spo_jax.formats.json_files import read_json

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for pairs, runs and table.md.")
TABLE = flags.DEFINE_bool("table", False, "Write the table of the runs that are there, and make none.")

NUMBERS = (15, 60, 240, 960)
SEEDS = (0, 1, 2)
# The learning rate is that of docs/own_pairs.md: by the recipe's, few pairs are learned by heart, and prompts are lost.
CHANGES = {
    "train.learning_rate": 3e-4,
    "validation.num_prompts": 1,
    "validation.every": 200,
    "checkpoint.every": 100,
}


def main() -> None:
    """Makes the runs that are missing, and writes the table after each."""
    workdir, recipe = cli.workdir_of(WORKDIR), dpo_tiny.get_config()
    if not TABLE.value:
        make_for(recipe)
        for seed in SEEDS:
            for number in NUMBERS:
                if not (folder_of(workdir, number, seed) / "summary.json").is_file():
                    config = config_of(recipe, pairs_of(workdir, number, seed), seed)
                    if methods.train(config, folder_of(workdir, number, seed)) is None:
                        notice("stopped; run the same command again to go on.")
                        return
                    jax.clear_caches()
                    write_table(workdir)
    write_table(workdir)


def folder_of(workdir: Path, number: int, seed: int) -> Path:
    """The --workdir of a run."""
    return workdir / f"labels_{number}_seed_{seed}"


def config_of(recipe: ConfigDict, data: str, seed: int) -> ConfigDict:
    """The recipe on the pairs ``data``."""
    config = copy.deepcopy(recipe)
    config.update_from_flattened_dict({**CHANGES, "seed": seed, "data.train": data})
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
    """Writes ``table.md``: means over the seeds, and their range."""
    lines = ["| labels | seeds | gain in base std | win rate | alignment lost | held-out accuracy |", "|---" * 6 + "|"]
    for number in NUMBERS:
        folders = [folder_of(workdir, number, seed) for seed in SEEDS]
        rows = [row_of(read_json(path)) for f in folders if (path := f / "summary.json").is_file()]
        if rows:
            columns = [[row[key] for row in rows] for key in ("gain", "wins", "lost", "accuracy")]
            cells = [f"{np.mean(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in columns]
            lines.append(f"| {number} | {len(rows)} | {' | '.join(cells)} |")
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
