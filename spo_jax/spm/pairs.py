"""Batches of the loader on the devices, with their captions tokenized for everyone who reads them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spo_jax.data.preferences import PairBatch
from spo_jax.distributed.mesh import batch_sharding
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.types import LabelledPairs, Tokenizer


class Tokenizers(NamedTuple):
    """What reads the captions: the base model's tokenizers, the preference model's, the labeller's if there is one."""

    pipeline: Pipeline
    scorer: Tokenizer
    labeller: Tokenizer | None = None


def rows_of(tokenizers: Tokenizers, batch: PairBatch) -> LabelledPairs:
    """The arrays of a batch, on the host, with its captions as token ids."""
    captions = list(batch.captions)
    rows = {
        "images": batch.images,
        "tokens": tokenize_prompts(tokenizers.pipeline, captions),
        "scorer_tokens": tokenize(tokenizers.scorer, captions),
        "labeller_tokens": None if tokenizers.labeller is None else tokenize(tokenizers.labeller, captions),
        "labels": batch.labels,
        "weights": batch.weights,
        "positions": batch.positions.astype(np.uint32),
    }
    return LabelledPairs(**rows)


def to_devices(tokenizers: Tokenizers, batch: PairBatch, mesh: Mesh) -> LabelledPairs:
    """Places this process's share of a batch on its devices."""
    split = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), rows_of(tokenizers, batch))
