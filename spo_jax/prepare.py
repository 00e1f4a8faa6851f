"""Preference pairs for training: reads them as they are published or collected, and writes what the loader reads.

    python -m spo_jax.prepare --source='pickapic/data/train-*.parquet' --split=train --out=data/pickapic
    python -m spo_jax.prepare --source='pickapic/data/validation_unique-*.parquet' --split=valid --out=data/pickapic
    python -m spo_jax.prepare --source=my_pairs --out=data/mine    # a folder with one CSV or JSONL file and pictures

Nothing is dropped or changed. Formats, and what training skips: docs/data.md.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError

if TYPE_CHECKING:
    from spo_jax.data.records import Record

SOURCE = flags.DEFINE_string("source", None, "Pattern of parquet files, a CSV or JSONL file, or the folder of one.")
SPLIT = flags.DEFINE_string("split", "train", "Name of what is read; training takes it as FOLDER@SPLIT.")
OUT = flags.DEFINE_string("out", None, "Folder to write to; it may have other splits already.")


def main() -> None:
    """Checks the flags and the files, and writes the split."""
    if not SOURCE.value:
        raise UserError("--source is missing; for example --source='pickapic/data/train-*.parquet'.")
    if not OUT.value:
        raise UserError("--out is missing; for example --out=data/pickapic.")

    from tqdm import tqdm

    from spo_jax.data.builder import check_output, write_split
    from spo_jax.data.records import fault_of
    from spo_jax.data.sources import open_source

    out, split = Path(OUT.value), SPLIT.value
    check_output(out, split)
    source = open_source(SOURCE.value)
    counts: collections.Counter[str] = collections.Counter()

    def counted() -> Iterator[Record]:
        for record in tqdm(source.read(), total=source.num_records, unit=" records", mininterval=1):
            counts["unlabelled" if not record["has_label"] else fault_of(record) or "good"] += 1
            yield record

    write_split(out, split, counted())
    others = ", ".join(f"{count} {name}" for name, count in counts.most_common() if name != "good")
    print(f"Wrote {counts.total()} records to {out}@{split}" + (f"; at first sight, {others}." if others else "."))


if __name__ == "__main__":
    cli.run(main)
