"""A checkpoint written by JAX 0.10.2 and orbax 0.12.8 is read, whichever versions are installed, bit for bit.

    python -m tests.runs.test_recorded_checkpoint     writes it anew

It has the state of each optimizer, with an average and accumulated gradients; its numbers are counted, not computed.
"""

import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import chex
import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.runs import checkpoint
from spo_jax.runs.optimizer import make_optimizer
from spo_jax.runs.state import TrainState
from spo_jax.spo import config as spo_config

RECORDED = Path(__file__).parents[1] / "golden" / "checkpoint_jax_0.10.2.tar.xz"
EXTRA = {"batch": 3, "epoch": 0.1, "name": "recorded"}


def counted(tree):
    """The same tree; every leaf holds numbers that are exact in its dtype and differ from those of the other leaves."""
    leaves, structure = jax.tree.flatten(tree)
    numbers = [np.arange(x.size).reshape(x.shape) / 8 + 100 * i for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, [jnp.asarray(n.astype(x.dtype)) for n, x in zip(numbers, leaves, strict=True)])


def make_states():
    lora = {"to_q": {"A": jnp.zeros((5, 2)), "B": jnp.zeros((2, 3))}}
    config, states = spo_config.get_config().train, {}
    config.max_grad_norm, config.accumulation_steps = 1.0, 2
    for config.optimizer in ("adamw", "adafactor"):
        states[config.optimizer] = TrainState(
            jnp.int32(0), {"lora": lora}, make_optimizer(config).transformation.init(lora), lora
        )
    return counted(states)


def test_it_is_read_bit_for_bit(tmp_path):
    with tarfile.open(RECORDED) as archive:
        archive.extractall(tmp_path, filter="data")
    manager = checkpoint.make_manager(tmp_path, keep=1)
    states, extra = checkpoint.restore_latest(manager, jax.tree.map(jnp.zeros_like, make_states()))
    checkpoint.close(manager)
    chex.assert_trees_all_equal(states, make_states())
    chex.assert_trees_all_equal_dtypes(states, make_states())
    assert extra == EXTRA


if __name__ == "__main__":
    with TemporaryDirectory() as _folder:
        _manager = checkpoint.make_manager(_folder, keep=1)
        checkpoint.save(_manager, 3, make_states(), EXTRA)
        checkpoint.close(_manager)
        with tarfile.open(RECORDED, "w:xz") as _archive:
            _archive.add(Path(_folder) / "3", "3")
