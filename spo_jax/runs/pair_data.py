"""Given pairs in a run: the loader of a split, and what is logged of its records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from spo_jax.data.preferences import PairLoader, open_pairs
from spo_jax.data.records import FAULTS


def open_loader(config: ConfigDict, name: str, batch_size: int, size: tuple[int, int], **options: Any) -> PairLoader:
    """This process's share of the batches of a split.

    Args:
      config: of the run; its seed, ``data.num_workers`` and ``data.strict`` are read.
      name: ``FOLDER@SPLIT``.
      batch_size: over all processes together.
      size: (H, W) of the images.
      options: further ones of ``PairLoader``.

    Raises:
      UserError: the split is not there, or a ``state`` among the options does not fit it.
    """
    return PairLoader(
        open_pairs(name),
        batch_size=batch_size // jax.process_count(),
        size=size,
        num_workers=config.data.num_workers,
        strict=config.data.strict,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **options,
    )


def validation_loader(config: ConfigDict, size: tuple[int, int]) -> PairLoader:
    """This process's share of the validation pairs that have a label, once and in order."""
    options = {"shuffle": False, "num_epochs": 1, "keep_only_with_label": True}
    return open_loader(config, config.data.validation, config.validation.batch_size, size, **options)


def data_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """Records so far: used, left out as unlabelled or as ties, and skipped, in all and by fault."""
    skipped = {f"skipped/{fault}": counts[fault] for fault in FAULTS if counts[fault]}
    tied = {"records_tied": counts["tied"]} if counts["tied"] else {}
    return {
        "records_used": counts["used"],
        "records_unlabelled": counts["unlabelled"],
        **tied,
        "records_skipped": sum(skipped.values()),
        **skipped,
    }
