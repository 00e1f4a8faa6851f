"""A smaller setting that fits: which knobs to turn for the program that needs too much, in which order, how far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from spo_jax.distributed.mesh import round_up
from spo_jax.distributed.pieces import piece_size

MAX_TURNS = 40
_LARGE_REST = 75  # percent; with so little left for programs, weights are split before anything else is given up


def search(
    config: ConfigDict, num_devices: int, worst: Callable[[ConfigDict], tuple[str, bool, int]]
) -> tuple[ConfigDict, dict[str, Any]] | None:
    """Turns knobs until everything fits.

    Args:
      config: the setting that does not fit; it is not changed.
      num_devices: of the target.
      worst: ``(config) -> (program, fits, percent of the limit that is resident)``, of the program that needs most.

    Returns:
      The config that fits and the keys that differ; None if no knob is left.
    """
    smaller = config.copy_and_resolve_references()
    changed: dict[str, Any] = {}
    for _ in range(MAX_TURNS):
        program, fits, resident_share = worst(smaller)
        if fits:
            return smaller, changed
        turn = next(_turns(smaller, program, num_devices, resident_share), None)
        if turn is None:
            return None
        with smaller.unlocked():
            smaller.update_from_flattened_dict(turn)
        changed |= turn
    return None


def _turns(config: ConfigDict, program: str, count: int, resident_share: int) -> Iterator[dict[str, Any]]:
    """Possible next turns for a program, the cheapest in time and in what is learned first."""
    split = {"mesh.fsdp": count, "mesh.data": 1} if config.mesh.fsdp not in (-1, count) and count > 1 else None
    if split and resident_share > _LARGE_REST:
        yield split
    yield from _spo(config, program, count) if config.method == "spo" else _spm(config, program, count)
    if split:
        yield split


def _spo(config: ConfigDict, program: str, count: int) -> Iterator[dict[str, Any]]:
    train, evaluation = config.train, config.evaluation
    pictures = {
        "pool": config.prompts_per_batch * config.sampling.num_candidates,
        "evaluation": round_up(evaluation.batch_size, count),
    }
    if (together := pictures.get("pool" if program == "score" else program)) is not None:
        size = piece_size(together, count, config.scorer.chunk) // count
        if size > 1:
            yield {"scorer.chunk": piece_size(together, count, size - 1) // count}
    if program == "update" and not config.remat:
        yield {"remat": True}
    if program != "encode" and not config.offload:
        yield {"offload": True}
    if program == "update" and train.minibatch_size > count and (half := _smaller(train.minibatch_size, count)):
        more = train.accumulation_steps * train.minibatch_size // half
        yield {"train.minibatch_size": half, "train.accumulation_steps": more}
    if program == "evaluation" and evaluation.batch_size > count:
        yield {"evaluation.batch_size": evaluation.batch_size // 2}
    if program in ("encode", "pool", "score") and (half := _smaller(config.prompts_per_batch, count)):
        yield {"prompts_per_batch": half, "num_batches": config.num_batches * config.prompts_per_batch // half}


def _spm(config: ConfigDict, program: str, count: int) -> Iterator[dict[str, Any]]:
    train, validation = config.train, config.validation
    if program == "update":
        if not config.remat:
            yield {"remat": True}
        chunk = config.chunk or train.batch_size
        smaller = [n for n in range(count, chunk, count) if train.batch_size % n == validation.batch_size % n == 0]
        if smaller:
            yield {"chunk": smaller[-1]}
        if half := _smaller(train.batch_size, count):
            more = train.accumulation_steps * train.batch_size // half
            yield {"train.batch_size": half, "train.accumulation_steps": more, "chunk": min(config.chunk, half)}
    elif half := _smaller(validation.batch_size, count):
        yield {"validation.batch_size": half, "chunk": min(config.chunk, half)}


def _smaller(size: int, count: int) -> int | None:
    """The largest divisor below a global batch size that ``count`` devices can split."""
    return next((n for n in range(size - 1, 0, -1) if size % n == 0 and n % count == 0), None)
