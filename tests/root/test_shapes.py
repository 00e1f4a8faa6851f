"""jaxtyping's annotations are checked while the tests run: an array of another shape or dtype is refused."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from spo_jax.preference.accuracy import agreement


def test_arrays_that_the_annotations_allow():
    assert agreement(jnp.zeros((3, 2)), jnp.zeros((3, 2))).shape == (3,)


@pytest.mark.parametrize(
    "labels", [jnp.zeros((3, 1)), jnp.zeros((4, 2)), jnp.zeros(2), jnp.zeros((3, 2), jnp.int32)],
    ids=["another size", "another number of rows", "another rank", "another dtype"],
)  # fmt: skip
def test_a_wrong_shape_or_dtype_is_refused_by_the_name_of_the_argument(labels):
    with pytest.raises(TypeCheckError, match=r"parameter 'labels'"):
        agreement(jnp.zeros((3, 2)), labels)
