"""What the configs of all methods share: keys, the range of each number, and refusing values that no run can use.

A method's own keys and their ranges stand in its folder, ``spo/config.py`` or ``spm/config.py``; those that methods
share which tune a UNet, in ``tuning_config.py``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from spo_jax.errors import UserError
from spo_jax.rng import MAX_SEED

OPTIMIZERS = ("adamw", "adafactor")

MAX_COUNT = 2**31 - 1  # counters are int32
MAX_BATCH = 2**16  # at a time
MAX_PIXELS = 2**14


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


def base_config() -> ConfigDict:
    """The keys that every method has; a method's ``get_config`` adds its own, and may give these other values."""
    c = ConfigDict()
    c.seed = 0  # root of every random number of the run, from 0 to 4294967295
    # A diffusers pipeline: a local folder, org/name@commit of the Hugging Face hub, or "emoji:..." out of the package;
    # or all of SD1.x, SD2.x or SDXL base in one .safetensors or .ckpt file, here or as org/name@commit/FILE.
    # Without a commit, or with a branch or tag behind the @, the commit is looked up once and kept in the workdir.
    c.model = "model"
    c.variant = ""  # of the weight files, such as "fp16"
    c.unet = ""  # UNet to use instead of the pipeline's, a folder as trainers save it; empty: the pipeline's
    c.vae = ""  # autoencoder to use instead of the pipeline's, named as the model is; empty: the pipeline's
    c.dtype = "bfloat16"  # in which networks compute; "float32" on CPUs. What is trained stays float32
    # Which attention: "xla" on any platform, "cudnn" on NVIDIA GPUs in bfloat16, "splash" on TPUs; "auto": that of the
    # platform where it can compute a layer, else "xla".
    c.attention = "auto"
    c.remat = False  # True computes activations again in the backward pass instead of keeping them: less memory

    c.train = ConfigDict()
    c.train.optimizer = "adamw"  # or "adafactor": a smaller state
    c.train.accumulation_steps = 1  # minibatches whose gradients are averaged before an optimizer step
    c.train.ema_decay = placeholder(float)  # of an average of what is trained, which is then the result; 0: off
    c.train.adam_b1 = 0.9
    c.train.adam_b2 = 0.999
    c.train.adam_eps = 1e-8

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that split the batch; -1: all that are left
    c.mesh.fsdp = 1  # devices that split large weights, their gradients and optimizer state too; -1: all that are left

    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 2  # checkpoints that are kept

    c.profile = 0  # steps of which a profiler trace is written to the workdir, after the one that compiles; 0: none
    c.wandb = ConfigDict()
    c.wandb.project = ""  # on Weights & Biases, where the run is shown as well; needs `pip install wandb`; empty: none
    c.wandb.entity = ""  # user or team that the project belongs to; empty: your default one
    c.wandb.name = ""  # of the run there; empty: one that W&B makes up
    return c


_REST = (-1, "all devices that are left")
BASE_RANGES = {
    "seed": Range(0, MAX_SEED),
    # Below, products with small gradients vanish in float32; above, no update would make sense.
    "train.learning_rate": Range(1e-12, 1.0),
    "train.accumulation_steps": Range(1, MAX_BATCH),
    "train.ema_decay": Range(0.0, 1.0, open="low high", special=(0, "off"), optional=True),
    "train.adam_b1": Range(0.0, 1.0, open="high"),
    "train.adam_b2": Range(0.0, 1.0, open="high"),
    "train.adam_eps": Range(1e-30, 1.0),
    "train.weight_decay": Range(0.0, 1.0),
    "train.max_grad_norm": Range(1e-6, 1e9, special=(0, "off"), optional=True),
    "mesh.data": Range(1, MAX_COUNT, special=_REST),
    "mesh.fsdp": Range(1, MAX_COUNT, special=_REST),
    "checkpoint.every": Range(1, MAX_COUNT),
    "checkpoint.keep": Range(1, MAX_COUNT),
    "profile": Range(1, MAX_COUNT, special=(0, "no trace")),
}


def check_base(config: ConfigDict, ranges: Mapping[str, Range], batches: Iterable[str], num_devices: int) -> None:
    """Refuses, with a UserError, numbers out of their range, by their full names, and what no method can use.

    Types and unknown keys are refused by ml_collections already. ``batches`` are the keys of batch sizes that the
    devices split.
    """
    from spo_jax.kernels.attention import KINDS  # it imports JAX; a config file is read without it

    for name, allowed in ranges.items():
        value = value_of(config, name)
        numbers = value if isinstance(value, tuple | list) else (value,)
        faults = [fault for number in numbers if (fault := allowed.fault(number))]
        if isinstance(value, tuple | list) and not all(isinstance(number, int) for number in numbers):
            faults.append("whole numbers")
        refuse(config, ((name, False, fault) for fault in faults))
    refuse(
        config,
        [
            ("dtype", config.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
            ("attention", config.attention in KINDS, " or ".join(KINDS)),
            ("train.optimizer", config.train.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS)),
            *(
                (key, value_of(config, key) % num_devices == 0, f"a multiple of {num_devices}, the number of devices")
                for key in batches
            ),
        ],
    )


def refuse(config: ConfigDict, rules: Iterable[tuple[str, bool, str]]) -> None:
    """Raises UserError for the first rule (key, whether it holds, what its value must be) that does not hold."""
    for name, holds, requirement in rules:
        if not holds:
            value = value_of(config, name)
            raise UserError(
                f"config.{name} must be {requirement}, not {value!r}; see the config file for what it means."
            )


def value_of(config: ConfigDict, name: str) -> Any:
    """The value of a key by its full name, such as "train.learning_rate"."""
    return functools.reduce(operator.getitem, name.split("."), config)
