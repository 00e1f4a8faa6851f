"""Parameters in safetensors files: written and read exactly, and refused by key where they do not fit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.errors import UserError
from spo_jax.formats.safetensors_io import read_tensors, write_params, write_tensors
from spo_jax.formats.weights import read_params

SHAPES = {
    "conv_1": {"kernel": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32)},
    "linear_1": {"kernel": jax.ShapeDtypeStruct((2, 5), jnp.float32), "bias": jax.ShapeDtypeStruct((5,), jnp.float32)},
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


def random_params(seed):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda s: np.float32(generator.standard_normal(s.shape)), SHAPES)


@given(seed=st.integers(0, 100))
def test_parameters_are_written_and_read_exactly(tmp_path_factory, seed):
    path = tmp_path_factory.mktemp("p") / "m.safetensors"
    write_params(path, random_params(seed), prefix="model.")
    assert set(read_tensors(path)) == {
        "model.conv.1.weight",
        "model.linear_1.weight",
        "model.linear_1.bias",
        "model.weight",
    }
    chex.assert_trees_all_equal(read_params(path, SHAPES, prefix="model."), random_params(seed))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("linear_1.bias"), "has no key 'linear_1.bias'"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "extra"),
        (lambda t: t.update({"linear_1.bias": np.zeros(4, np.float32)}), r"'linear_1.bias' has shape \(4,\)"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    write_params(path, random_params(0))
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)
    with pytest.raises(UserError, match=message):
        read_params(path, SHAPES)
