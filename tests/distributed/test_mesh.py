"""Where arrays lie on eight devices, and meshes that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.distributed.mesh import batch_sharding, check_divisible, constrain_batch, make_mesh, replicated
from spo_jax.errors import UserError


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (1, 8)])
def test_a_batch_is_split_over_all_devices_whatever_the_axes(sizes):
    mesh = make_mesh(*sizes)
    x = jax.device_put(jnp.arange(48.0).reshape(16, 3), batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
    rows = sorted(shard.index[0].start for shard in x.addressable_shards)
    assert rows == list(range(0, 16, 2)), "each device has rows of its own"


@pytest.mark.parametrize("axis, shape", [(0, (1, 16, 8)), (1, (8, 2, 8)), (2, (8, 16, 1))])
def test_any_axis_can_be_the_batch(axis, shape):
    x = jax.device_put(jnp.zeros((8, 16, 8)), batch_sharding(make_mesh(-1, 1), axis))
    assert {shard.data.shape for shard in x.addressable_shards} == {shape}


def test_replicated_is_whole_on_every_device():
    x = jax.device_put(jnp.arange(3.0), replicated(make_mesh(2, -1)))
    assert x.is_fully_replicated and len(x.addressable_shards) == 8


def test_constrain_batch_splits_every_array_and_keeps_its_values():
    mesh = make_mesh(-1, 1)
    tree = {"a": jnp.arange(16.0), "b": (jnp.ones((8, 2)),)}
    result = jax.jit(lambda t: constrain_batch(mesh, t))(tree)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(result), strict=True):
        assert not after.is_fully_replicated
        assert after.sharding.is_equivalent_to(batch_sharding(mesh), after.ndim)
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("sizes", [(3, -1), (3, 1), (-1, -1), (0, -1), (-2, 1), (-2, -4), (-1, 16), (8, 8)])
def test_impossible_meshes_name_both_sizes(sizes):
    with pytest.raises(UserError, match=f"data={sizes[0]}, fsdp={sizes[1]}.* does not fit the 8 devices here; use"):
        make_mesh(*sizes)


def test_one_size_may_be_what_the_other_leaves():
    assert dict(make_mesh(-1, 1).shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(2, -1).shape) == {"data": 2, "fsdp": 4}


def test_divisible_sizes_pass():
    for size in (8, 16, 64):
        check_divisible("config.prompts_per_batch", size, make_mesh(4, 2))
    with pytest.raises(UserError, match=r"config\.prompts_per_batch = 4 .* make it a multiple of 8"):
        check_divisible("config.prompts_per_batch", 4, make_mesh(4, 2))
