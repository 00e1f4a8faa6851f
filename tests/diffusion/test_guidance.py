"""Classifier-free guidance: both halves in one batch, each with its own text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.types import PromptBatch


def network(variables, latents, timesteps, context):
    """Depends on everything it is given, row by row."""
    summary = jnp.sin(context * jnp.arange(1, context.shape[1] + 1)[:, None]).sum((1, 2))
    return variables * latents * jnp.cos(timesteps + summary)[:, None, None, None]


def inputs(seed, count, negatives):
    generator = np.random.default_rng(seed)
    latents, embeddings, negative = (
        jnp.asarray(generator.standard_normal(shape), jnp.float32)
        for shape in ((count, 2, 3, 1), (count, 4, 2), (negatives, 4, 2))
    )
    return latents, jnp.asarray(generator.integers(0, 1000, count)), embeddings, negative


@settings(max_examples=10)
@given(
    seed=st.integers(0, 1000), count=st.integers(1, 4), scale=st.sampled_from([0.0, 1.0, 5.0, -2.0]), each=st.booleans()
)
def test_guidance_is_the_line_through_two_separate_calls(seed, count, scale, each):
    latents, t, text, negative = inputs(seed, count, count if each else 1)
    output = make_guided_prediction(network, scale)(2.0, latents, t, PromptBatch(text, negative, None))
    uncond = network(2.0, latents, t, jnp.broadcast_to(negative, text.shape))
    cond = network(2.0, latents, t, text)
    np.testing.assert_allclose(output, uncond + scale * (cond - uncond), rtol=1e-4, atol=1e-5)
    if scale == 0:
        np.testing.assert_array_equal(output, uncond)
    if scale == 1:
        np.testing.assert_array_equal(output, cond)


def test_one_network_call_and_rows_do_not_mix():
    calls = []

    def counted(variables, latents, timesteps, context):
        calls.append(latents.shape[0])
        return network(variables, latents, timesteps, context)

    latents, t, text, negative = inputs(0, 3, 1)
    predict = make_guided_prediction(counted, 5.0)
    whole = predict(2.0, latents, t, PromptBatch(text, negative, None))
    assert calls == [6]
    calls.clear()
    make_guided_prediction(counted, 1.0)(2.0, latents, t, PromptBatch(text, negative, None))
    assert calls == [3], "without guidance there is no second half"
    for i in range(3):
        row = slice(i, i + 1)
        np.testing.assert_allclose(
            whole[row], predict(2.0, latents[row], t[row], PromptBatch(text[row], negative, None)), rtol=1e-6
        )


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_gradient_flows_through_both_halves(scale):
    latents, t, text, negative = inputs(1, 2, 1)
    predict = make_guided_prediction(network, scale)
    gradient = jax.grad(lambda v: predict(v, latents, t, PromptBatch(text, negative, None)).sum())(2.0)
    uncond = network(1.0, latents, t, jnp.broadcast_to(negative, text.shape)).sum()
    cond = network(1.0, latents, t, text).sum()
    np.testing.assert_allclose(gradient, uncond + scale * (cond - uncond), rtol=1e-4)


def test_output_is_float32_though_the_network_is_not():
    latents, t, text, negative = inputs(0, 2, 1)
    predict = make_guided_prediction(lambda *a: network(*a).astype(jnp.bfloat16), 5.0)
    assert predict(2.0, latents, t, PromptBatch(text, negative, None)).dtype == jnp.float32
