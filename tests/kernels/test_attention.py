"""Attention: every kind has the values and gradients of the formula; pieces, memory, no communication; refusals."""

import functools
import re
from types import SimpleNamespace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec

from spo_jax.distributed.mesh import batch_sharding, jit_on, make_mesh
from spo_jax.errors import UserError
from spo_jax.kernels import attention, splash, xla
from spo_jax.kernels.attention import multi_head_attention

INNER = [(4, 64, 64), (8, 64, 77), (12, 64, 64)]  # heads, queries, keys
OUTER = [(8, 4096, 4096), (8, 4096, 77), (8, 1024, 1024), (10, 4096, 4096), (1, 16384, 16384)]


def naive(query, key, value, cotangent, mask=None):
    """softmax(Q K^T / sqrt(d)) V of [B, L, h, d] and its gradients, in float64."""
    query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
    scale = query.shape[-1] ** -0.5
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    logits = logits if mask is None else np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("bqhd,bkhd->bhqk", cotangent, value)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bhqk,bkhd->bqhd", weights, value),
        np.einsum("bhqk,bkhd->bqhd", d_logits, key),
        np.einsum("bhqk,bqhd->bkhd", d_logits, query),
        np.einsum("bhqk,bqhd->bkhd", weights, cotangent),
    )


def tokens(seed, batch, queries, keys, heads, size):
    generator = np.random.default_rng(seed)
    lengths = (queries, keys, keys, queries)
    return [jnp.asarray(generator.standard_normal((batch, n, heads, size)), jnp.float32) for n in lengths]


def value_and_grads(attend, inputs, cotangent):
    @jax.jit
    def both(inputs, cotangent):
        out, backward = jax.vjp(attend, *inputs)
        return out, *backward(cotangent)

    return both(inputs, cotangent)


@settings(max_examples=12)
@given(
    queries=st.integers(1, 21), keys=st.integers(1, 11), heads=st.sampled_from([1, 2, 3]), seed=st.integers(0, 9),
    rows=st.integers(1, 8), groups=st.sampled_from(["one", "heads", "units"]),
)  # fmt: skip
def test_pieces_give_the_values_and_gradients_of_the_formula(queries, keys, heads, seed, rows, groups):
    *inputs, cotangent = tokens(seed, 2, queries, keys, heads, 4)
    count = {"one": 1, "heads": heads, "units": 2 * heads}[groups]
    cut = xla.Cut(count, min(rows, queries), by_head=groups == "heads")
    found = value_and_grads(lambda *xs: xla.attend(*xs, cut), inputs, cotangent)
    for a, b in zip(found, naive(*inputs, cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cut_batch", [True, False])
@pytest.mark.parametrize("shape", [(2, 1024, 1024, 2, 8), (4, 257, 257, 6, 16), (2, 2048, 77, 4, 8)])
def test_every_cut_is_exact_to_float32_also_where_logits_are_large(shape, cut_batch):
    *inputs, cotangent = tokens(0, *shape)
    inputs[0] = 20 * inputs[0]  # logits of some hundreds: exp of them would overflow
    batch, queries, keys, heads, _ = shape
    cut = xla.cut_of(batch, heads, queries, keys, cut_batch=cut_batch)
    found = value_and_grads(lambda *xs: xla.attend(*xs, cut), inputs, cotangent)
    for a, b in zip(found, naive(*inputs, cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


def test_a_mask_is_kept():
    *inputs, cotangent = tokens(0, 2, 7, 7, 2, 4)
    mask = np.tril(np.ones((7, 7), bool))[None, None]

    def attend(*xs):
        return multi_head_attention(*(x.reshape(2, 7, 8) for x in xs), 2, mask).reshape(2, 7, 2, 4)

    for a, b in zip(value_and_grads(attend, inputs, cotangent), naive(*inputs, cotangent, mask), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


def test_gradients_of_keys_are_summed_over_pieces_in_float32():
    """Of 512 pieces that give about one half each, a sum in bfloat16 would not get beyond 128."""
    *inputs, _ = (x.astype(jnp.bfloat16) for x in tokens(0, 1, 512, 2, 1, 4))
    ones = jnp.ones_like(inputs[0])
    pieces, whole = (
        value_and_grads(lambda *xs, rows=rows: xla.attend(*xs, xla.Cut(1, rows, by_head=False)), inputs, ones)[3]
        for rows in (1, 512)
    )
    np.testing.assert_allclose(pieces.astype(np.float32), whole.astype(np.float32), rtol=2**-7)


# ------------------------------------------------------------------------------------------------------------- kernels
@pytest.mark.parametrize("queries", [64, 256])
@pytest.mark.parametrize("keys", [None, 77], ids=["self", "text"])
@pytest.mark.parametrize("size", [40, 160])
def test_splash_has_the_values_and_gradients_of_the_formula(queries, keys, size):
    check_splash(queries, keys or queries, size)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [64, 256, 1024])
@pytest.mark.parametrize("keys", [None, 77], ids=["self", "text"])
@pytest.mark.parametrize("size", [40, 64, 80, 160])
def test_splash_at_the_sizes_of_sd15_and_sdxl(queries, keys, size):
    check_splash(queries, keys or queries, size)


def check_splash(queries, keys, size):
    *inputs, cotangent = tokens(0, 1, queries, keys, 2, size)
    found = value_and_grads(lambda *xs: splash.attend(*xs, interpret=True), inputs, cotangent)
    for a, b in zip(found, naive(*inputs, cotangent), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "kind, platform, dtype, size, queries, expected",
    [
        ("auto", "cpu", "float32", 40, 4096, "xla"),
        ("auto", "cuda", "bfloat16", 40, 4096, "cudnn"),
        ("auto", "cuda", "bfloat16", 80, 257, "cudnn"),
        ("auto", "gpu", "bfloat16", 80, 257, "xla"),
        ("auto", "cuda", "float32", 40, 4096, "xla"),
        ("cudnn", "cuda", "bfloat16", 160, 256, "xla"),
        ("auto", "tpu", "bfloat16", 40, 4096, "splash"),
        ("auto", "tpu", "bfloat16", 160, 64, "xla"),
        ("splash", "tpu", "float32", 160, 64, "splash"),
        ("auto", "tpu", "bfloat16", 512, 4096, "xla"),
        ("xla", "tpu", "bfloat16", 40, 4096, "xla"),
    ],
)
def test_a_kind_is_taken_where_it_can_compute(kind, platform, dtype, size, queries, expected):
    attention.check_kind(kind, platform, dtype)
    assert attention.choose(kind, platform, dtype, size, queries) == expected


@pytest.mark.parametrize(
    "platform, capability, expected",
    [
        ("gpu", "9.0", "cuda"),
        ("gpu", "8.0", "cuda"),
        ("gpu", "7.5", "gpu"),
        ("gpu", "gfx90a", "gpu"),
        ("tpu", "", "tpu"),
    ],
)
def test_gpus_before_ampere_and_amds_have_no_cudnn_attention(platform, capability, expected):
    assert attention.platform_of(SimpleNamespace(platform=platform, compute_capability=capability)) == expected


@pytest.mark.parametrize(
    "kind, platform, dtype, message",
    [
        ("cudnn", "cpu", "bfloat16", "'cudnn' is for NVIDIA GPUs from Ampere on, and this is a cpu"),
        ("cudnn", "tpu", "bfloat16", "'cudnn' is for NVIDIA GPUs"),
        ("cudnn", "gpu", "bfloat16", "from Ampere on, and this is a gpu"),
        ("splash", "cuda", "bfloat16", "'splash' is for TPUs"),
        ("cudnn", "cuda", "float32", "has no float32"),
    ],
)
def test_a_kind_that_cannot_run_is_refused_by_name(kind, platform, dtype, message):
    with pytest.raises(UserError, match=message):
        attention.check_kind(kind, platform, dtype)


# ------------------------------------------------------------------------------------------------ memory, many devices
def traced(heads, queries, keys):
    shapes = [jax.ShapeDtypeStruct((2, n, 8 * heads), jnp.float32) for n in (queries, keys, keys)]
    return str(jax.make_jaxpr(lambda *xs: multi_head_attention(*xs, heads))(*shapes))


def test_what_is_small_stays_whole():
    """The emoji models and the innermost level of SD1.5: the program of jax.nn.dot_product_attention."""
    assert not [shape for shape in INNER if "custom_vjp" in traced(*shape)]


def test_no_piece_has_more_logits_than_the_bound():
    for heads, queries, keys in OUTER:
        # Values of a sample inside the program that have a row of keys for each of many queries.
        found = re.findall(rf"\[2,(\d+),{keys}\]", traced(heads, queries, keys))
        assert found, (heads, queries, keys)
        assert max(int(rows) for rows in found) * keys <= xla.SAMPLE_LOGITS


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


def test_a_kernel_of_several_devices_computes_the_samples_of_each_without_communication(monkeypatch):
    """Inside ``shard_map``, as the compiler cannot look into a kernel; splash, step by step, stands for all."""
    monkeypatch.setattr(attention, "choose", lambda *_: "splash")
    monkeypatch.setattr(splash, "attend", functools.partial(splash.attend, interpret=True))
    mesh = make_mesh(4, 2)
    *inputs, cotangent = tokens(0, 8, 64, 64, 1, 8)
    placed = jax.device_put([x.reshape(8, 64, 8) for x in (*inputs, cotangent)], batch_sharding(mesh))

    def both(query, key, value, cotangent):
        out, backward = jax.vjp(lambda *xs: multi_head_attention(*xs, 1), query, key, value)
        return out, *backward(cotangent)

    program = jit_on(mesh, both).lower(*placed).compile()
    for a, b in zip(program(*placed), naive(*inputs, cotangent), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, atol=1e-5)
        assert len(a.sharding.device_set) == 8
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", program.as_text())
