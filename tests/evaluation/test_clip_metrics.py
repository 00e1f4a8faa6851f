"""PickScore, HPSv2, aesthetic and CLIP score, against what their authors' programs gave."""

import hashlib
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
import safetensors.numpy

from spo_jax import errors
from spo_jax.errors import UserError
from spo_jax.evaluation import clip_metrics, preprocess
from spo_jax.evaluation.clip_metrics import (
    MetricOptions,
    aesthetic_scores,
    in_batches,
    make_towers,
    read_aesthetic_head,
)
from spo_jax.evaluation.image_metrics import IMAGE_METRICS
from spo_jax.formats.open_clip import read_open_clip
from spo_jax.formats.pipeline import read_clip
from spo_jax.formats.remote import parse_remote
from spo_jax.images import to_uint8
from tests import golden_metrics
from tests.golden_metrics import CAPTIONS, FOLDER

GOLDEN = golden_metrics.load()
PICTURES = golden_metrics.pictures(GOLDEN)
MATRIX = (len(PICTURES), len(CAPTIONS))
OPTIONS = MetricOptions(tokenizer=str(FOLDER / "tokenizer"), aesthetic_clip=str(FOLDER / "clip_l14"))
HPS_FILE, AESTHETIC_FILE = "HPS_v2.1_compressed.pt", "sac+logos+ava1-l14-linearMSE.pth"


def close(got, name, tolerance):
    np.testing.assert_allclose(got, GOLDEN[name], rtol=0, atol=tolerance)


def opened(name, folder, **changes):
    options = MetricOptions(**{"tokenizer": OPTIONS.tokenizer, "aesthetic_clip": OPTIONS.aesthetic_clip, **changes})
    return IMAGE_METRICS[name](str(folder), options)


def scored(name, folder, **changes):
    return opened(name, folder, **changes).score(*golden_metrics.all_pairs(GOLDEN)).reshape(MATRIX)


@pytest.fixture(scope="module")
def pick():
    clip, params = read_clip(FOLDER / "pickscore", step_aware=False)
    return make_towers(clip, params, OPTIONS)


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory):
    """The recorded affine map as a file of the published shapes: its product is the map, nearly all of it is noise."""
    generator = np.random.default_rng(0)
    widths = {"layers.2": (128, 1024), "layers.4": (64, 128), "layers.6": (16, 64), "layers.7": (1, 16)}
    layers = {f"{key}.weight": generator.standard_normal(shape) / shape[1] ** 0.5 for key, shape in widths.items()}
    after = np.linalg.multi_dot([layers[f"{key}.weight"] for key in reversed(widths)])  # [1, 1024]
    first = generator.standard_normal((1024, 768)) / 768**0.5
    first += after.T @ (GOLDEN["aes_affine_w"] - after @ first) / (after @ after.T)
    layers |= {"layers.0.weight": first, "layers.0.bias": generator.standard_normal(1024) / 10}
    offset = layers["layers.0.bias"]
    for key, shape in widths.items():
        layers[f"{key}.bias"] = generator.standard_normal(shape[0]) / 10
        offset = layers[f"{key}.weight"] @ offset + layers[f"{key}.bias"]
    layers["layers.7.bias"] += GOLDEN["aes_affine_b"] - offset
    folder = tmp_path_factory.mktemp("aesthetic")
    single = {key: np.ascontiguousarray(value, np.float32) for key, value in layers.items()}
    safetensors.numpy.save_file(single, folder / AESTHETIC_FILE)  # what is in a file counts, not its suffix
    return folder


# -------------------------------------------------------------------------------------------------------------- HPSv2
@pytest.mark.parametrize(("resize", "tolerance"), [("tensor", 5e-3), ("tensor_antialias", 2e-3), ("pil_crop", 2e-3)])
def test_hpsv2_is_that_of_its_program(resize, tolerance):
    close(scored("hpsv2.1", FOLDER / "hpsv2", hpsv2_resize=resize), f"hps_{resize}_score", tolerance)
    clip, params = read_open_clip(FOLDER / "hpsv2" / HPS_FILE)
    towers = make_towers(clip, params, OPTIONS)
    pixels = [preprocess.hpsv2_pixels(picture, 24, resize) for picture in PICTURES]
    close(towers.images(pixels), f"hps_{resize}_image_features", tolerance / 100)
    close(towers.texts(GOLDEN["hps_ids"]), "hps_text_features", 1e-5)


def test_hidden_states_are_those_of_open_clip():
    clip, params = read_open_clip(FOLDER / "hpsv2" / HPS_FILE)

    def hidden(method, rows):
        keep = lambda module, _: module.name == "pre_layrnorm" or (module.name or "").startswith("layers_")  # noqa: E731
        variables = clip.apply({"params": params}, rows, method=method, capture_intermediates=keep)[1]
        flat = flax.traverse_util.flatten_dict(variables["intermediates"])
        order = sorted(flat, key=lambda path: (path[1] != "pre_layrnorm", path))
        return np.stack([flat[path][0] for path in order])

    with jax.default_matmul_precision("highest"):
        close(hidden(clip.image_features, GOLDEN["hps_tensor_antialias_pixels"][:2]), "hps_vision_hidden", 1e-4)
        close(hidden(clip.text_features, GOLDEN["hps_ids"][[0, 9]]), "hps_text_hidden", 1e-4)


def test_hpsv2_reads_a_file_a_folder_and_either_version(tmp_path):
    source = FOLDER / "hpsv2" / HPS_FILE
    pair = PICTURES[:1], CAPTIONS[:1]
    expected = opened("hpsv2.1", source.parent).score(*pair)
    assert opened("hpsv2.1", source).score(*pair) == expected
    shutil.copy(source.with_name("open_clip_config.json"), tmp_path)
    shutil.copy(source, tmp_path / "HPS_v2_compressed.pt")
    metric = opened("hpsv2", tmp_path)
    assert metric.score(*pair) == expected and metric.title == "HPSv2"


# ---------------------------------------------------------------------------------------- PickScore and the CLIP score
def test_pickscore_is_that_of_transformers(pick):
    close(scored("pickscore", FOLDER / "pickscore"), "pick_score", 2e-3)
    pixels = [preprocess.clip_pixels(picture, 24, preprocess.TRANSFORMERS) for picture in PICTURES]
    close(pick.images(pixels), "pick_image_features", 1e-5)
    close(pick.texts(GOLDEN["clip_ids"]), "pick_text_features", 1e-5)


def test_floats_are_scored_as_the_8_bit_pictures_that_they_make():
    metric = opened("pickscore", FOLDER / "pickscore")
    for image, expected in zip(to_uint8(GOLDEN["quant_x"]), GOLDEN["quant_pick_score"], strict=True):
        np.testing.assert_allclose(metric.score([image] * len(CAPTIONS), CAPTIONS), expected, rtol=0, atol=2e-3)


def test_clip_score_is_100_cosines_by_which_the_other_definitions_are_told():
    ours = scored("clip_h", FOLDER / "pickscore")
    close(ours, "clip_score_100cos", 2e-3)
    close(np.maximum(ours, 0), "clip_score_max0", 2e-3)
    close(np.maximum(2.5 * ours / 100, 0), "clip_score_2.5", 5e-5)
    # torchmetrics clips the mean at 0, and not each score.
    for name in ("mixed", "negative"):
        rows, columns = GOLDEN[f"clip_tm_pairs_{name}"].T
        close(max(ours[rows, columns].mean(), 0), f"clip_tm_{name}", 2e-3)
        assert abs(np.maximum(ours[rows, columns], 0).mean() - GOLDEN[f"clip_tm_{name}"]) > 0.01 or name == "negative"


def test_quick_gelu_of_openai_is_read_from_the_config():
    close(scored("clip", FOLDER / "clip_l14"), "clip_openai_100cos", 2e-3)


def test_long_captions_keep_their_end_unlike_in_torchmetrics(pick):
    """There the end token is cut off, so that the start token is pooled and every long caption scores the same."""
    cut = np.array(GOLDEN["clip_ids"][9:10])
    cut[:, -1] = cut[:, -2]  # any token but the end
    pixels = [preprocess.clip_pixels(picture, 24, preprocess.TRANSFORMERS) for picture in PICTURES]
    theirs = 100 * (pick.images(pixels) * pick.texts(cut)).sum(-1)
    close(theirs, "clip_tm_long", 2e-3)
    ours = opened("clip_h", FOLDER / "pickscore").score(PICTURES, [CAPTIONS[9]] * len(PICTURES))
    assert np.abs(ours - GOLDEN["clip_tm_long"]).max() > 0.1
    np.testing.assert_allclose(ours, GOLDEN["clip_score_100cos"][:, 9], rtol=0, atol=2e-3)


# ---------------------------------------------------------------------------------------------------------- aesthetic
def test_aesthetic_predictor_is_that_of_its_program(aesthetic):
    head = read_aesthetic_head(aesthetic / AESTHETIC_FILE)
    close(aesthetic_scores(head, GOLDEN["aes_x"]), "aes_x_score", 1e-4)
    metric = opened("aesthetic", aesthetic)
    close(metric.score(PICTURES, [""] * len(PICTURES)), "aes_score", 1e-4)
    assert not metric.reads_prompts


def test_aesthetic_predictor_sees_embeddings_of_unit_length(aesthetic):
    clip, params = read_clip(FOLDER / "clip_l14", step_aware=False)
    pixels = preprocess.normalised(GOLDEN["hps_pil_crop_uint8"])
    close(make_towers(clip, params, OPTIONS).images(pixels[:4]), "aes_clip_embeds", 1e-5)
    bare = np.asarray(clip.apply({"params": params}, pixels, method=clip.image_features))
    wrong = aesthetic_scores(read_aesthetic_head(aesthetic / AESTHETIC_FILE), bare)
    close(wrong, "aes_score_unnormalised", 1e-4)
    assert np.abs(wrong - GOLDEN["aes_score"]).max() > 0.1


def test_other_heads_and_other_clips_are_refused(aesthetic, tmp_path):
    safetensors.numpy.save_file({"weight": np.zeros((1, 768), np.float32)}, tmp_path / AESTHETIC_FILE)
    with pytest.raises(UserError, match=r"Metric aesthetic: .*is not the aesthetic predictor V2.*V1's heads"):
        opened("aesthetic", tmp_path)
    with pytest.raises(UserError, match=r"embeddings of 12 numbers, not 768; .* needs OpenAI's ViT-L/14"):
        opened("aesthetic", aesthetic, aesthetic_clip=str(FOLDER / "pickscore"))


# ------------------------------------------------------------------------------------------------------------- all
def test_any_number_of_pictures_is_scored_in_batches_of_one_shape():
    shapes = []

    def program(rows):
        shapes.append(rows.shape)
        return rows.sum(axis=1)

    rows = np.arange(14.0).reshape(7, 2)
    np.testing.assert_array_equal(in_batches(program, 3, iter(rows)), rows.sum(axis=1))
    assert shapes == [(3, 2)] * 3
    small = scored("pickscore", FOLDER / "pickscore", batch_size=3)
    close(small, "pick_score", 2e-3)
    metric = opened("pickscore", FOLDER / "pickscore")
    assert metric.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        metric.score(PICTURES[:2], CAPTIONS[:1])


def test_captions_that_are_cut_off_are_told(capsys):
    for name, folder in (("clip", "clip_l14"), ("hpsv2.1", "hpsv2")):
        opened(name, FOLDER / folder).score(PICTURES[:2], [CAPTIONS[0], CAPTIONS[16]])
        said = capsys.readouterr().err
        assert "1 of 2 prompts are longer than the 77 tokens" in said and "dog" in said
        errors.notice.cache_clear()


def test_aesthetic_of_no_pictures_is_empty(aesthetic):
    assert opened("aesthetic", aesthetic).score([], []).shape == (0,)


def test_settings_tell_files_and_how_they_were_used():
    weights = FOLDER / "hpsv2" / HPS_FILE
    settings = opened("hpsv2.1", weights, hpsv2_resize="tensor_antialias").settings
    assert settings == {
        "weights": str(weights),
        f"sha256 of {HPS_FILE}": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "tokenizer": OPTIONS.tokenizer,
        "resize": "tensor_antialias",
        "images": "8-bit",
        "dtype": "float32",
        "scale": 100.0,
    }
    half = opened("pickscore", FOLDER / "pickscore", dtype="bfloat16")
    assert half.settings["dtype"] == "bfloat16" and 98 < half.settings["scale"] < 99
    scores = half.score(PICTURES, CAPTIONS[: len(PICTURES)])
    np.testing.assert_allclose(scores, np.diagonal(GOLDEN["pick_score"]), rtol=0, atol=2.0)


@pytest.mark.parametrize("name", sorted(clip_metrics.PLACES))
def test_a_metric_without_its_files_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=rf"Metric {name}: '.*nothing' does not exist here; give a local path"):
        opened(name, tmp_path / "nothing")
    with pytest.raises(UserError, match=rf"Metric {name}: .* does not exist"):
        opened(name, tmp_path)
    with pytest.raises(UserError, match="resize 'nearest' is not known; choose one of tensor, tensor_antialias"):
        opened("hpsv2", tmp_path, hpsv2_resize="nearest")


def test_every_metric_has_a_default_place_at_a_commit():
    assert set(clip_metrics.PLACES) < set(IMAGE_METRICS)
    for place in clip_metrics.PLACES.values():
        assert parse_remote(place).pinned
