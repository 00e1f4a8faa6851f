"""Pairs of pictures with simulated human preferences: what ``configs/spm_tiny.py`` learns from.

    python -m spo_jax.emoji.pairs --prepared                 # what config.data.train = "emoji:pairs@train" reads
    python -m spo_jax.emoji.pairs --out=runs/emoji_pairs     # the pictures and labels themselves

The shipped base model draws several pictures of each caption, and simulated people prefer the more colourful one of two
(Hasler and Suesstrunk 2003), with the noise of the Bradley-Terry model: ``P(a preferred) =
sigmoid((colourfulness(a) - colourfulness(b)) / TEMPERATURE)``. A pair of ``train`` has the votes of eight people as its
label, one of ``validation`` and ``test`` the choice of one. Each split is a JSONL file beside its pictures, as a user's
own pairs would be; ``python -m spo_jax.prepare`` reads it. Captions of ``test`` are those that neither the base model
nor SPO has seen.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from spo_jax import cli
from spo_jax.emoji.make_pairs import PREPARED_SEED, make_prepared, splits, write_pairs
from spo_jax.errors import UserError

SEED = cli.seed_flag("Seed of pictures and labels.")
OUT = flags.DEFINE_string("out", None, "A new folder.")
PREPARED = flags.DEFINE_bool("prepared", False, "Make what emoji:pairs stands for, if it is not there.")


def main() -> None:
    """Writes the pairs, or what ``emoji:pairs`` stands for."""
    if PREPARED.value:
        if OUT.value or SEED.value != PREPARED_SEED:
            raise UserError("--prepared has a place and a seed of its own; leave --out and --seed out.")
        print(f"emoji:pairs@train and emoji:pairs@validation are in {make_prepared()}.")
        return
    if not OUT.value:
        raise UserError("--out is missing; for example --out=runs/emoji_pairs, or give --prepared.")
    out = Path(OUT.value)
    if out.exists():
        raise UserError(f"--out={out} is there already; choose a new folder, or delete it.")
    print(json.dumps(write_pairs(out, SEED.value, splits(SEED.value))))


if __name__ == "__main__":
    cli.run(main)
