"""Preference pairs for training: reads them as they are published or collected, and writes what the loader reads.

    python -m spo_jax.prepare --source='pickapic/data/train-*.parquet' --split=train --out=data/pickapic
    python -m spo_jax.prepare --source='pickapic/data/validation_unique-*.parquet' --split=valid --out=data/pickapic
    python -m spo_jax.prepare --source=my_pairs --out=data/mine    # one CSV or JSONL file, or chosen/ and rejected/
    python -m spo_jax.prepare --source=my_pairs --ties=drop --relabel=pickscore --out=data/by_pickscore

Nothing is dropped or changed, unless it is asked for. Formats, and what training skips: docs/data.md.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError

if TYPE_CHECKING:
    from spo_jax.data.records import Record

SOURCE = flags.DEFINE_string("source", None, "Pattern of parquet files, a CSV or JSONL file, or a folder of pairs.")
SPLIT = flags.DEFINE_string("split", "train", "Name of what is read; training takes it as FOLDER@SPLIT.")
OUT = flags.DEFINE_string("out", None, "Folder to write to; it may have other splits already.")
TIES = flags.DEFINE_enum("ties", "keep", ["keep", "drop"], "What becomes of records whose two labels are equal.")
RELABEL = flags.DEFINE_string(
    "relabel", None, "Metric that labels the pairs anew, NAME or NAME=PLACE as evaluate's --metrics, before --ties."
)


def main() -> None:
    """Checks the flags and the files, and writes the split."""
    if not SOURCE.value:
        raise UserError("--source is missing; for example --source='pickapic/data/train-*.parquet'.")
    if not OUT.value:
        raise UserError("--out is missing; for example --out=data/pickapic.")

    from tqdm import tqdm

    from spo_jax.data.builder import check_output, write_split
    from spo_jax.data.records import fault_of, is_tied
    from spo_jax.data.sources import open_source

    out, split = Path(OUT.value), SPLIT.value
    check_output(out, split)
    source = open_source(SOURCE.value)
    counts: collections.Counter[str] = collections.Counter()
    done: collections.Counter[str] = collections.Counter()
    labeller = None
    if RELABEL.value is not None:
        from spo_jax.evaluation.relabel import open_labeller, relabelled  # JAX and its models

        labeller = open_labeller(RELABEL.value)

    def written() -> Iterator[Record]:
        records: Iterable[Record] = tqdm(source.read(), total=source.num_records, unit=" records", mininterval=1)
        if labeller is not None:
            records = relabelled(records, labeller, done)
        for record in records:
            if TIES.value == "drop" and is_tied(record):
                done["tied"] += 1
                continue
            counts["unlabelled" if not record["has_label"] else fault_of(record) or "good"] += 1
            yield record

    try:
        write_split(out, split, written())
    except UserError:
        if done["tied"] == source.num_records > 0:
            raise UserError(f"All {done['tied']} records of --source are ties; leave --ties=drop out.") from None
        raise
    print(_summary(f"{out}@{split}", counts, done))


def _summary(name: str, counts: collections.Counter[str], done: collections.Counter[str]) -> str:
    """What was written and what was done to it, in one sentence."""
    parts = [f"Wrote {counts.total()} records to {name}"]
    if TIES.value == "drop":
        parts.append(f"left out {done['tied']} tied")
    if RELABEL.value is not None:
        kept = f" ({done['kept']} with a fault kept their labels)" if done["kept"] else ""
        parts.append(f"labelled {done['relabelled']} by {RELABEL.value}{kept}")
    others = ", ".join(f"{count} {name}" for name, count in counts.most_common() if name != "good")
    if others:
        parts.append(f"at first sight, {others}")
    return "; ".join(parts) + "."


if __name__ == "__main__":
    cli.run(main)
