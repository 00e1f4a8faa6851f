"""Batches of the loader on the devices, with their captions tokenized for everyone who reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spo_jax.data.preferences import PairBatch
from spo_jax.distributed.mesh import batch_sharding
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.tokenizers import tokenize, tokenize_prompts
from spo_jax.types import JudgedPairs


class Tokenizers(NamedTuple):
    """What reads the captions: the base model's tokenizers, the preference model's, and the judge's if there is one."""

    pipeline: Pipeline
    scorer: Any
    judge: Any = None


def make_to_devices(tokenizers: Tokenizers, mesh: Mesh) -> Callable[[PairBatch], JudgedPairs]:
    """A function that tokenizes the captions of this process's share of a batch and places it on its devices."""
    split = batch_sharding(mesh)

    def to_devices(batch: PairBatch) -> JudgedPairs:
        rows = {
            "images": batch.images,
            "tokens": tokenize_prompts(tokenizers.pipeline, batch.captions),
            "scorer_tokens": tokenize(tokenizers.scorer, batch.captions),
            "judge_tokens": None if tokenizers.judge is None else tokenize(tokenizers.judge, batch.captions),
            "labels": batch.labels,
            "weights": batch.weights,
            "positions": batch.positions.astype(np.uint32),
        }
        return JudgedPairs(**jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), rows))

    return to_devices
