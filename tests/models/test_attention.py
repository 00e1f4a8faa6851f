"""Attention in pieces is attention: the same values and gradients, less memory, no communication."""

import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec

from spo_jax.models import attention
from spo_jax.models.attention import multi_head_attention

INNER = [(8, 256, 256), (8, 1024, 77), (16, 257, 257), (20, 77, 77), (4, 64, 64)]  # heads, queries, keys
OUTER = [(8, 4096, 4096), (8, 4096, 77), (8, 1024, 1024), (10, 4096, 4096), (1, 16384, 16384)]


def naive(query, key, value, num_heads, mask=None):
    """softmax(Q K^T / sqrt(d)) V of every head at once, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    query, key, value = (x.reshape(*x.shape[:2], num_heads, -1) for x in (query, key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    logits = logits if mask is None else np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
    return out.reshape(*out.shape[:2], -1)


def tokens(seed, batch, queries, keys, channels):
    generator = np.random.default_rng(seed)
    lengths = (queries, keys, keys)
    return [jnp.asarray(generator.standard_normal((batch, n, channels)), jnp.float32) for n in lengths]


def value_and_grads(inputs, cotangent, num_heads, mask, bound):
    """Attention and its gradients with another bound on what is computed at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_LOGITS", bound)

        @jax.jit
        def both(inputs, cotangent):
            out, backward = jax.vjp(lambda *xs: multi_head_attention(*xs, num_heads, mask), *inputs)
            return out, *backward(cotangent)

        return both(inputs, cotangent)


@settings(max_examples=8)
@given(
    queries=st.integers(1, 21), keys=st.integers(1, 11), heads=st.sampled_from([1, 2, 3]), bound=st.integers(1, 100),
    masked=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_pieces_give_the_values_and_gradients_of_the_whole(queries, keys, heads, bound, masked, seed):
    inputs = tokens(seed, 2, queries, keys, 4 * heads)
    generator = np.random.default_rng(seed)
    mask = generator.random((1, 1, queries, keys)) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True  # a query that sees nothing has no softmax
    cotangent = jnp.asarray(generator.standard_normal((2, queries, 4 * heads)), jnp.float32)
    pieces = value_and_grads(inputs, cotangent, heads, mask, bound)
    whole = value_and_grads(inputs, cotangent, heads, mask, 10**9)
    np.testing.assert_allclose(pieces[0], naive(*inputs, heads, mask), atol=1e-6)
    for a, b in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_gradients_of_keys_are_summed_over_pieces_in_float32():
    """Of 512 pieces that give about one half each, a sum in bfloat16 would not get beyond 128."""
    queries, keys, values = (x.astype(jnp.bfloat16) for x in tokens(0, 1, 512, 2, 4))
    ones = jnp.ones_like(queries)
    _, _, _, pieces = value_and_grads((queries, keys, values), ones, 1, None, 2)
    _, _, _, whole = value_and_grads((queries, keys, values), ones, 1, None, 10**9)
    np.testing.assert_allclose(pieces.astype(np.float32), whole.astype(np.float32), rtol=2**-7)


def traced(heads, queries, keys):
    shapes = [jax.ShapeDtypeStruct((2, n, 8 * heads), jnp.float32) for n in (queries, keys, keys)]
    return str(jax.make_jaxpr(lambda *xs: multi_head_attention(*xs, heads))(*shapes))


def test_what_is_small_stays_whole():
    """The emoji models, CLIP, inner levels: the program of jax.nn.dot_product_attention and nothing else."""
    assert not [shape for shape in INNER if "scan" in traced(*shape)]


def test_no_piece_has_more_logits_than_the_bound():
    for heads, queries, keys in OUTER:
        # Values of a sample inside the program that have a row of keys for each of many queries.
        found = re.findall(rf"\[1,2,1,(\d+),{keys}\]", traced(heads, queries, keys))
        assert found, (heads, queries, keys)
        assert max(int(rows) for rows in found) * keys <= attention.MAX_LOGITS


def gradient_program(batch, queries, channels, heads, sharding=None):
    def loss(*xs):
        return multi_head_attention(*xs, heads).sum()

    shape = jax.ShapeDtypeStruct((batch, queries, channels), jnp.float32, sharding=sharding)
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()


def test_memory_is_that_of_a_piece():
    """SD1.5 at 512 pixels, two samples: the logits of all heads would take a GiB, and as much again on the way back."""
    program = gradient_program(2, 4096, 320, 8)
    assert "4096,4096]" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2**27


def test_a_batch_that_is_split_over_devices_needs_no_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    program = gradient_program(8, 1536, 64, 2, jax.NamedSharding(mesh, PartitionSpec("data")))
    text = program.as_text()
    assert "while" in text
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)
    assert program.output_shardings[0].spec[0] == "data"
