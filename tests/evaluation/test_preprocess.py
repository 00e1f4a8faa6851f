"""Sizes and pixels that scorers see, against torchvision, transformers, hpsv2 and Pillow as they were recorded."""

import numpy as np
import pytest

from spo_jax.evaluation import preprocess
from spo_jax.evaluation.preprocess import TORCHVISION, TRANSFORMERS
from spo_jax.images import to_uint8
from tests import golden_metrics

GOLDEN = golden_metrics.load()
PICTURES = golden_metrics.pictures(GOLDEN)
TOLERANCES = {"tensor": 5e-4, "tensor_antialias": 1e-4}


def test_sizes_and_crops_are_those_of_the_libraries():
    sides = [(int(height), int(width)) for height, width in GOLDEN["geom_in"]]
    short = [preprocess.shorter_side(*side, 224) for side in sides]
    np.testing.assert_array_equal(short, GOLDEN["geom_short"])
    for rule in (TORCHVISION, TRANSFORMERS):
        starts = [[preprocess.centre(length, 224, rule) for length in side] for side in short]
        np.testing.assert_array_equal(starts, GOLDEN[f"geom_crop_{rule}"])
    assert preprocess.shorter_side(640, 720, 224) == (224, 252)
    # At SDXL's 832 x 1216 the two crops are a pixel apart.
    height = preprocess.shorter_side(1216, 832, 224)[0]
    assert preprocess.centre(height, 224, TORCHVISION) - preprocess.centre(height, 224, TRANSFORMERS) == 1


def test_hpsv2_sizes_and_padding_are_those_of_its_program():
    sides = [(int(height), int(width)) for height, width in GOLDEN["geom_in"]]
    long = [preprocess.longer_side(*side, 224) for side in sides]
    np.testing.assert_array_equal(long, GOLDEN["geom_long"])
    pads = np.array([preprocess.padding(*side, 224) for side in long])
    # Where the longer side is 224 already, its program forgets to pad, and fails; see ``hpsv2_tensor``.
    done = np.array([max(side) == 224 for side in sides])
    np.testing.assert_array_equal(pads[~done], GOLDEN["geom_pad"][~done])
    assert not GOLDEN["geom_pad"][done].any() and pads[done].any()


@pytest.mark.parametrize("resize", sorted(TOLERANCES))
def test_hpsv2_tensor_pixels_are_those_of_its_program(resize):
    pixels = [preprocess.hpsv2_pixels(picture, 24, resize) for picture in PICTURES]
    np.testing.assert_allclose(pixels, GOLDEN[f"hps_{resize}_pixels"], rtol=0, atol=TOLERANCES[resize])
    for name in ("formula", "wide"):
        real = preprocess.hpsv2_pixels(GOLDEN[f"pic_{name}"], 224, resize)
        expected = GOLDEN[f"hps224_{resize}_{name}"]
        np.testing.assert_allclose(real[::14, ::14], expected, rtol=0, atol=TOLERANCES[resize])
        assert real.shape == (224, 224, 3) and real.dtype == np.float32


@pytest.mark.parametrize("resize", sorted(TOLERANCES))
def test_hpsv2_pads_what_its_program_leaves_unpadded(resize):
    pixels = preprocess.hpsv2_pixels(GOLDEN["pic_edge"], 24, resize)
    np.testing.assert_allclose(pixels[:, 4:19], GOLDEN["hps_edge_pixels"], rtol=0, atol=1e-5)
    black = preprocess.normalised(np.zeros(3, np.float32))
    assert (pixels[:, :4] == black).all() and (pixels[:, 19:] == black).all() and (black < -1.4).all()


def test_pillow_crops_are_exact():
    for size, rule, name in ((24, TRANSFORMERS, "pick"), (24, TORCHVISION, "hps"), (32, TORCHVISION, "ir")):
        crop = "pil_crop" if name == "hps" else "pil"
        got = [preprocess.pil_crop(picture, size, rule) for picture in PICTURES]
        np.testing.assert_array_equal(got, GOLDEN[f"{name}_{crop}_uint8"])
    for pixels, expected in ((preprocess.clip_pixels, "pick"), (preprocess.clip_pixels, "hps_pil_crop")):
        rule = TRANSFORMERS if expected == "pick" else TORCHVISION
        got = [pixels(picture, 24, rule) for picture in PICTURES[:2]]
        np.testing.assert_allclose(got, GOLDEN[f"{expected}_pixels"], rtol=0, atol=1e-5)
    got = [preprocess.hpsv2_pixels(picture, 24, "pil_crop") for picture in PICTURES[:2]]
    np.testing.assert_allclose(got, GOLDEN["hps_pil_crop_pixels"], rtol=0, atol=1e-5)


def test_floats_are_rounded_to_8_bits_as_saved_pictures_are():
    np.testing.assert_array_equal(to_uint8(GOLDEN["quant_x"]), GOLDEN["quant_uint8"])
    assert to_uint8(np.float32([-7, -1, 0, 1, 7])).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 0, 3), np.uint8)])
@pytest.mark.parametrize("resize", preprocess.RESIZES)
def test_what_is_no_8_bit_image_is_refused(image, resize):
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\]"):
        preprocess.hpsv2_pixels(image, 2, resize)
