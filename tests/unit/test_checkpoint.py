"""Checkpoints that are damaged or of another run, and where arrays come back to; the rest is in test_records.py."""

import gc
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spo_jax.distributed.mesh import batch_sharding, make_mesh, replicated
from spo_jax.errors import UserError
from spo_jax.training import checkpoint
from spo_jax.types import TrainState

# When one read fails, orbax drops the others unawaited; they are collected here, not during some later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


def make_state(seed, rows=5):
    lora = {"to_q": {"A": jax.random.normal(jax.random.key(seed), (rows, 2)), "B": jnp.full((2, 3), 1 / 3)}}
    optimizer = optax.adamw(1e-3, weight_decay=1e-4)
    updates, opt_state = optimizer.update(lora, optimizer.init(lora), lora)
    return TrainState(jnp.int32(seed), optax.apply_updates(lora, updates), opt_state)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("checkpoints") / "c"
    manager = checkpoint.make_manager(folder, keep=2)
    for step in (1, 2):
        checkpoint.save(manager, step, make_state(step), {"batch": step})
    checkpoint.close(manager)
    return folder


def restore(folder, template):
    manager = checkpoint.make_manager(folder, keep=2)
    try:
        return checkpoint.restore_latest(manager, template)
    finally:
        checkpoint.close(manager)


def bits(tree):
    return [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in map(np.asarray, jax.tree.leaves(tree))]


def test_every_bit_comes_back(written):
    state, extra = restore(written, make_state(0))
    chex.assert_trees_all_equal_structs(state, make_state(2))
    assert bits(state) == bits(make_state(2))
    assert extra == {"batch": 2}


def test_unusual_numbers_come_back(tmp_path):
    values = {
        "float32": np.array([np.nan, np.inf, -0.0, 1e-45, 1 / 3], np.float32),
        "bfloat16": jnp.array([1 / 3, -0.0, jnp.inf], jnp.bfloat16),
        "int32": np.array([-(2**31), 2**31 - 1], np.int32),
        "scalar": jnp.uint32(2**32 - 1),
    }
    manager = checkpoint.make_manager(tmp_path, keep=1)
    checkpoint.save(manager, 1, values, {})
    checkpoint.close(manager)
    state, extra = restore(tmp_path, jax.tree.map(jnp.zeros_like, values))
    assert bits(state) == bits(values)
    assert extra == {}


def test_arrays_come_back_to_the_devices_of_the_template(tmp_path):
    mesh = make_mesh(-1, 1)
    values = jnp.arange(16.0).reshape(8, 2)
    manager = checkpoint.make_manager(tmp_path, keep=1)
    checkpoint.save(manager, 1, {"x": jax.device_put(values, jax.devices()[0])}, {})
    checkpoint.close(manager)
    for sharding in (replicated(mesh), batch_sharding(mesh)):
        state, _ = restore(tmp_path, {"x": jax.device_put(jnp.zeros((8, 2)), sharding)})
        assert state["x"].sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(state["x"], values)


@pytest.mark.parametrize("template", [make_state(0, rows=7), {"other": jnp.zeros(3)}], ids=["shape", "structure"])
def test_checkpoint_of_another_model_is_refused(written, template):
    with pytest.raises(UserError, match=r"Checkpoint .*/2 cannot be restored .*choose another --workdir"):
        restore(written, template)


@pytest.mark.parametrize("damage", ["extra/metadata", "state/_METADATA", "state/manifest.ocdbt"])
def test_damaged_checkpoint_is_refused_and_the_one_before_can_be_used(written, tmp_path, damage):
    folder = shutil.copytree(written, tmp_path / "c")
    content = (folder / "2" / damage).read_bytes()
    (folder / "2" / damage).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"/2 cannot be restored .*delete it to go on from the one before") as caught:
        restore(folder, make_state(0))
    assert len(str(caught.value)) < 500, "a sentence, not the specification of a tensor"
    shutil.rmtree(folder / "2")
    state, extra = restore(folder, make_state(0))
    assert bits(state) == bits(make_state(1))
    assert extra == {"batch": 1}


def test_half_written_checkpoint_is_ignored_and_its_step_can_be_written(written, tmp_path):
    """A checkpoint gets its final name when it is complete; a kill leaves the temporary one."""
    folder = shutil.copytree(written, tmp_path / "c")
    left = shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp-1")
    (left / "state" / "manifest.ocdbt").unlink()
    assert restore(folder, make_state(0))[1] == {"batch": 2}
    manager = checkpoint.make_manager(folder, keep=2)
    checkpoint.save(manager, 3, make_state(3), {"batch": 3})
    checkpoint.close(manager)
    state, extra = restore(folder, make_state(0))
    assert bits(state) == bits(make_state(3))
    assert extra == {"batch": 3}


@pytest.mark.parametrize("content", [b'{"seed": ', b"\xff\xfe", b""])
def test_damaged_config_of_a_workdir(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is damaged .*choose another --workdir"):
        checkpoint.check_workdir(tmp_path, {"seed": 0})
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize(
    "old, new, message",
    [
        ({"a": 1}, {"a": 1, "b": 2}, r"config\.b is only in the new one"),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 1}}, r"config\.a\.y is only in the old one"),
        ({"a": {"x": 1}}, {"a": 1}, r"config\.a was {'x': 1} there and is 1 now"),
        ({"a": None}, {"a": 1.0}, r"config\.a was None there and is 1\.0 now"),
    ],
)
def test_first_difference_between_configs_is_named(tmp_path, old, new, message):
    checkpoint.check_workdir(tmp_path, old)
    with pytest.raises(UserError, match=message):
        checkpoint.check_workdir(tmp_path, new)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == old


def test_config_that_json_writes_differently_is_still_the_same(tmp_path):
    config = {"sizes": (1, 2), "rate": 1e-4, "none": None}
    checkpoint.check_workdir(tmp_path, config)
    checkpoint.check_workdir(tmp_path, config)
