"""What the preference model is shown, and the score it gives."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from spo_jax.preference.scorers import CLIP_MEAN, CLIP_STD, make_clip_scorer, preprocess_images, resized


@settings(max_examples=8)
@given(
    height=st.integers(8, 48), width=st.integers(8, 48), size=st.sampled_from([8, 14, 24]), seed=st.integers(0, 1000)
)
def test_any_picture_is_resized_cropped_and_normalised_as_by_pytorch(height, width, size, seed):
    # Beyond [-1, 1] too: a decoder overshoots, and what bicubic makes of it is clipped only after the resize.
    images = np.random.default_rng(seed).uniform(-1.5, 1.5, (1, height, width, 3)).astype(np.float32)
    scale = size / min(height, width)
    new = (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(images.transpose(0, 3, 1, 2)), size=new, mode="bicubic", align_corners=False, antialias=False
    )
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    cropped = resized[:, :, top : top + size, left : left + size].permute(0, 2, 3, 1).numpy()
    expected = (np.clip(cropped / 2 + 0.5, 0, 1) - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    ours = preprocess_images(jnp.asarray(images), size)
    assert ours.shape == (1, size, size, 3)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("value, expected", [(-1.0, 0.0), (-7.0, 0.0), (0.0, 0.5), (1.0, 1.0), (3.0, 1.0)])
def test_flat_pictures_stay_flat_and_are_clipped(value, expected):
    pixels = preprocess_images(jnp.full((1, 10, 15, 3), value), 8)
    normal = (expected - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(pixels, np.broadcast_to(normal, (1, 8, 8, 3)), rtol=0, atol=1e-5)


def test_picture_of_the_right_size_is_not_touched_and_low_precision_is_left():
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)), jnp.bfloat16)
    pixels = preprocess_images(images, 8)
    assert pixels.dtype == jnp.float32
    back = (pixels * jnp.array(CLIP_STD) + jnp.array(CLIP_MEAN) - 0.5) * 2
    np.testing.assert_allclose(back, images.astype(jnp.float32), rtol=0, atol=1e-5)


class FakeClip:
    """Towers of one line each, so that the scorer's own arithmetic shows."""

    image_size, tower = 8, None

    def __init__(self, step_aware):
        self.step_aware = step_aware

    def text_features(self, tokens):
        return tokens.astype(jnp.bfloat16)

    def image_features(self, pixels, timesteps=None):
        assert (timesteps is not None) == self.step_aware
        shift = 0 if timesteps is None else timesteps[:, None] / 100
        return pixels.mean((1, 2)) + shift

    def apply(self, variables, *inputs, method):
        assert set(variables) == {"params"}
        return method(*inputs)


@pytest.mark.parametrize("step_aware", [False, True])
def test_score_is_the_scaled_cosine(step_aware):
    scorer, generator = make_clip_scorer(FakeClip(step_aware)), np.random.default_rng(0)
    params = {"logit_scale": jnp.float32(1.5)}
    images = jnp.asarray(generator.uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)
    tokens, times = jnp.asarray(generator.integers(1, 9, (4, 3))), jnp.array([0, 100, 500, 951])
    text = scorer.encode_text(params, tokens)
    np.testing.assert_allclose(jnp.linalg.norm(text, axis=1), 1, rtol=1e-6)
    scores = scorer.score(params, images, text, times)
    features = np.asarray(preprocess_images(images, 8)).mean((1, 2)) + (np.asarray(times)[:, None] / 100) * step_aware
    for i in range(4):
        a, b = features[i].astype(np.float64), np.asarray(tokens[i], np.float64)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        np.testing.assert_allclose(scores[i], np.exp(1.5) * cosine, rtol=1e-4, atol=1e-5)
    assert scores.dtype == text.dtype == jnp.float32
    other = scorer.score(params, images, text, times + 100)
    assert (np.asarray(other == scores)).all() == (not step_aware)
    assert jax.jit(scorer.score)(params, images, text, times).shape == (4,)


@pytest.mark.parametrize("shape", [(96, 96), (60, 97), (33, 20), (80, 90)])
def test_with_antialias_the_pixels_are_those_of_clips_own_image_processor(shape):
    """Which judges that look at pictures themselves were trained with. Pillow rounds and clips to 8 bits in between."""
    images = np.random.default_rng(0).integers(64, 192, (2, *shape, 3), np.uint8)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    theirs = np.moveaxis(processor(list(images), return_tensors="np")["pixel_values"], 1, -1)
    ours = preprocess_images(jnp.asarray(images / 127.5 - 1, jnp.float32), 24, antialias=True)
    assert np.abs(np.asarray(ours) - theirs).max() * min(CLIP_STD) < 2 / 255


def sizes_of_clips_own_image_processor(height, width, size):
    from transformers.image_transforms import get_resize_output_image_size

    picture = np.zeros((height, width, 3), np.uint8)
    return get_resize_output_image_size(picture, size, default_to_square=False, input_data_format="channels_last")


@pytest.mark.parametrize(
    ("picture", "expected"),  # recorded from transformers and torchvision
    [
        ((512, 512), (224, 224)),
        ((640, 720), (224, 252)),
        ((720, 640), (252, 224)),
        ((640, 680), (224, 238)),
        ((640, 1440), (224, 504)),
        ((832, 1216), (224, 327)),
        ((1216, 832), (327, 224)),
        ((1344, 768), (392, 224)),
        ((100, 224), (224, 501)),
        ((224, 113), (444, 224)),
        ((225, 224), (225, 224)),
    ],
)
def test_recorded_sizes_of_antialiased_pictures(picture, expected):
    assert resized(*picture, 224, antialias=True) == expected == sizes_of_clips_own_image_processor(*picture, 224)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), size=st.sampled_from([14, 224, 336]))
def test_antialiased_pictures_have_the_size_of_clips_own_image_processor(height, width, size):
    hypothesis.assume(max(height, width) < 20 * min(height, width))
    ours = resized(height, width, size, antialias=True)
    assert ours == sizes_of_clips_own_image_processor(height, width, size)
    assert min(ours) == min(resized(height, width, size, antialias=False)) == size
    assert resized(height, height, size, antialias=True) == resized(height, height, size, antialias=False)


def test_one_text_for_several_images_is_refused():
    params = {"logit_scale": jnp.float32(0.0)}
    with pytest.raises((AssertionError, TypeCheckError), match="shape"):
        make_clip_scorer(FakeClip(False)).score(
            params, jnp.zeros((2, 8, 8, 3)), jnp.ones((1, 3)), jnp.zeros(2, jnp.int32)
        )
