"""Batches of the loader on the devices, with their captions tokenized for everyone who reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spo_jax.data.preferences import PairBatch
from spo_jax.distributed.mesh import batch_sharding
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.types import LabelledPairs, Tokenizer


class Tokenizers(NamedTuple):
    """What reads the captions: the base model's tokenizers, and those of preference model and labeller if there are."""

    pipeline: Pipeline
    scorer: Tokenizer | None = None
    labeller: Tokenizer | None = None


def rows_of(tokenizers: Tokenizers, batch: PairBatch) -> LabelledPairs:
    """The arrays of a batch, on the host, with its captions as token ids."""
    captions = list(batch.captions)

    def ids(tokenizer: Tokenizer | None) -> np.ndarray | None:
        return None if tokenizer is None else tokenize(tokenizer, captions)

    rows: dict[str, Any] = {
        "images": batch.images,
        "tokens": tokenize_prompts(tokenizers.pipeline, captions),
        "crops": batch.crops,
        "scorer_tokens": ids(tokenizers.scorer),
        "labeller_tokens": ids(tokenizers.labeller),
        "labels": batch.labels,
        "weights": batch.weights,
        "positions": batch.positions.astype(np.uint32),
    }
    return LabelledPairs(**rows)


def blank_rows(tokenizers: Tokenizers, size: int, image_size: tuple[int, int]) -> LabelledPairs:
    """Rows of ``size`` pairs that say nothing, for their shapes."""
    blank = PairBatch(
        images=np.zeros((size, 2, *image_size, 3), np.uint8),
        captions=[""] * size,
        crops=np.zeros((size, 2, 4), np.int32),
        labels=np.zeros((size, 2), np.float32),
        weights=np.zeros(size, np.float32),
        positions=np.zeros(size, np.int64),
    )
    return rows_of(tokenizers, blank)


def to_devices(tokenizers: Tokenizers, batch: PairBatch, mesh: Mesh) -> LabelledPairs:
    """Places this process's share of a batch on its devices."""
    split = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), rows_of(tokenizers, batch))
