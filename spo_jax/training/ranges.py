"""The range of every number of a config: its sign and its bounds, generous ones where none is natural."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from spo_jax.rng import MAX_SEED

_COUNT = 2**31 - 1  # counters are int32
_BATCH = 2**16  # at a time
_PIXELS = 2**14


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``, without the ends that are ``open``, ("low", "high" or both).

    ``special`` is one more number, with its meaning; ``optional`` allows None; ``why`` the range begins where it does.
    """

    low: float
    high: float
    open: str = ""
    special: tuple[float, str] | None = None
    optional: bool = False
    why: str = ""

    def fault(self, value: Any) -> str | None:
        """What ``value`` would have to be; None if it is in the range. A float is judged as float32 has it."""
        if value is None and self.optional:
            return None
        more = "" if self.special is None else f", or {self.special[0]} for {self.special[1]}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "a number" + more
        if self.special is not None and value == self.special[0]:
            return None
        number, low, high = (_as_float32(x) for x in (value, self.low, self.high))
        if not math.isfinite(number):
            return "a finite number" + more
        if number < low or (number == low and "low" in self.open):
            least = f"at least {self.low}" if "low" not in self.open else "positive" if not low else f"above {self.low}"
            return least + more + (f", {self.why}" if self.why else "")
        if number > high or (number == high and "high" in self.open):
            return f"{'below' if 'high' in self.open else 'at most'} {self.high}" + more
        return None


def _as_float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value)) if isinstance(value, float) else value


_REST = (-1, "all devices that are left")
_BOTH = {
    "seed": Range(0, MAX_SEED),
    # Below, products with small gradients vanish in float32; above, no update would make sense.
    "train.learning_rate": Range(1e-12, 1.0),
    "train.accumulation_steps": Range(1, _BATCH),
    "train.ema_decay": Range(0.0, 1.0, open="low high", special=(0, "off"), optional=True),
    "train.adam_b1": Range(0.0, 1.0, open="high"),
    "train.adam_b2": Range(0.0, 1.0, open="high"),
    "train.adam_eps": Range(1e-30, 1.0),
    "train.weight_decay": Range(0.0, 1.0),
    "train.max_grad_norm": Range(1e-6, 1e9, special=(0, "off"), optional=True),
    "mesh.data": Range(1, _COUNT, special=_REST),
    "mesh.fsdp": Range(1, _COUNT, special=_REST),
    "checkpoint.every": Range(1, _COUNT),
    "checkpoint.keep": Range(1, _COUNT),
}
SPO_RANGES = _BOTH | {
    "num_batches": Range(1, _COUNT),
    "prompts_per_batch": Range(1, _BATCH),
    "sampling.num_steps": Range(2, 1000),
    "sampling.num_plain_steps": Range(0, 999),
    "sampling.num_candidates": Range(2, 1024),
    "sampling.num_inner_steps": Range(0, 999),
    "sampling.height": Range(8, _PIXELS, optional=True),
    "sampling.width": Range(8, _PIXELS, optional=True),
    "sampling.guidance_scale": Range(0.0, 1000.0),
    "sampling.eta": Range(0.0, 1.0, open="low", why="because candidates differ only by their noise"),
    "scorer.chunk": Range(1, _BATCH, special=(0, "no limit")),
    "pairs.threshold": Range(0.0, 1.0, open="high"),
    "loss.beta": Range(1e-6, 1e6),
    "loss.clip_range": Range(1e-6, 1.0, open="high"),
    "lora.rank": Range(1, 4096, special=(0, "full fine-tuning")),
    "train.minibatch_size": Range(1, _BATCH),
    "validation.every": Range(1, _COUNT, special=(0, "none")),
    "validation.num_prompts": Range(1, _BATCH),
    "evaluation.num_prompts": Range(1, _COUNT),
    "evaluation.batch_size": Range(1, _BATCH),
    "evaluation.eta": Range(0.0, 1.0),
}
SPM_RANGES = _BOTH | {
    "num_steps": Range(1, _COUNT),
    "guidance_scale": Range(0.0, 1000.0),
    "timesteps": Range(0, _BATCH),
    "chunk": Range(1, _BATCH, special=(0, "a whole batch")),
    "height": Range(8, _PIXELS, optional=True),
    "width": Range(8, _PIXELS, optional=True),
    "data.num_workers": Range(0, 1024),
    "labels.threshold": Range(0.0, 1.0, open="high"),
    "train.batch_size": Range(1, _BATCH),
    "train.warmup_steps": Range(0, _COUNT),
    "log_every": Range(1, _COUNT),
    "validation.every": Range(1, _COUNT),
    "validation.num_pairs": Range(1, _COUNT),
    "validation.timesteps": Range(0, _BATCH),
    "validation.batch_size": Range(1, _BATCH),
}
