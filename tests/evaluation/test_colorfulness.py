"""The colourfulness score against its formula in NumPy, and the properties it is used for."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.evaluation.metrics import colorfulness

SEEDS = st.integers(0, 2**32 - 1)
few = hypothesis.settings(deadline=None, max_examples=20)


def random_images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (*shape, 3)).astype(np.float32)


def reference(image: np.ndarray) -> float:
    """The formula of the paper, one picture, float64, population standard deviations."""
    red, green, blue = ((image.astype(np.float64) + 1) * 255 / 2).reshape(-1, 3).T
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(np.std(rg), np.std(yb)) + 0.3 * np.hypot(np.mean(rg), np.mean(yb)))


@few
@hypothesis.given(SEEDS)
def test_agrees_with_formula(seed):
    images = random_images(seed, 2, 3, 5, 7)
    expected = [[reference(image) for image in row] for row in images]
    chex.assert_trees_all_close(colorfulness(jnp.asarray(images)), jnp.asarray(expected, jnp.float32), rtol=1e-4)


def test_known_picture():
    """Half pure red, half pure blue: rg is 255 or 0, yb 127.5 or -255."""
    image = -np.ones((2, 2, 3), np.float32)
    image[0, :, 0] = 1
    image[1, :, 2] = 1
    expected = np.hypot(127.5, 191.25) + 0.3 * np.hypot(127.5, 63.75)
    np.testing.assert_allclose(colorfulness(jnp.asarray(image)), expected, rtol=1e-5)


@few
@hypothesis.given(SEEDS)
def test_gray_scores_zero(seed):
    gray = np.repeat(random_images(seed, 4, 6)[..., :1], 3, axis=-1)
    np.testing.assert_allclose(colorfulness(jnp.asarray(gray)), 0, atol=1e-3)


@few
@hypothesis.given(SEEDS)
def test_place_of_pixels_does_not_matter(seed):
    image = random_images(seed, 6, 4)
    shuffled = np.random.default_rng(seed).permutation(image.reshape(-1, 3)).reshape(image.shape)
    for other in (shuffled, image[::-1], image[:, ::-1]):
        np.testing.assert_allclose(colorfulness(jnp.asarray(other)), colorfulness(jnp.asarray(image)), rtol=1e-4)


@few
@hypothesis.given(SEEDS, st.floats(0, 0.9))
def test_proportional_to_saturation(seed, factor):
    """Blending towards a gray of each pixel scales both opponent axes, and so the score, by the same factor."""
    image = random_images(seed, 6, 4)
    gray = image.mean(-1, keepdims=True)
    duller = gray + factor * (image - gray)
    full = colorfulness(jnp.asarray(image))
    np.testing.assert_allclose(colorfulness(jnp.asarray(duller)), factor * full, rtol=1e-3, atol=1e-3)
    assert colorfulness(jnp.asarray(duller)) < full


def test_values_out_of_range_are_clipped_and_jit_keeps_the_value():
    image = 3 * random_images(0, 8, 8)
    expected = colorfulness(jnp.asarray(np.clip(image, -1, 1)))
    np.testing.assert_allclose(jax.jit(colorfulness)(jnp.asarray(image)), expected, rtol=1e-5)
