"""ImageReward against numbers recorded from its authors' program (``tests/golden/metrics``), and bad files."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from spo_jax.errors import UserError
from spo_jax.evaluation import imagereward
from spo_jax.evaluation.imagereward import open_imagereward
from spo_jax.evaluation.preprocess import TORCHVISION, normalised, pil_crop
from spo_jax.formats import download, hub
from spo_jax.formats import imagereward as files
from spo_jax.models.blip import Sizes

METRICS = Path(__file__).parents[1] / "golden" / "metrics"
FOLDER = METRICS / "imagereward"
VIT = json.loads((FOLDER / "vit_config.json").read_text(encoding="utf-8"))
SIZES = Sizes(**VIT, head=(48, 32, 16, 8))
CAPTIONS = json.loads((METRICS / "captions.json").read_text(encoding="utf-8"))
PICTURES = (
    "square",
    "same",
    "half_even",
    "odd_pad",
    "wide",
    "tall",
    "small",
    "crop_odd",
    "crop_odd_ir",
    "big",
    "formula",
)


@pytest.fixture(scope="module")
def golden():
    with np.load(METRICS / "golden.npz", allow_pickle=False) as stored:
        return {name: array for name, array in stored.items() if name.startswith(("ir_", "pic_"))}


@pytest.fixture(scope="module")
def pictures(golden):
    y, x, c = np.ogrid[:512, :512, :3]
    formula = ((7 * x + 13 * y + 50 * c + x * y // 5) % 256).astype(np.uint8)
    return [formula if name == "formula" else golden[f"pic_{name}"] for name in PICTURES]


@pytest.fixture(scope="module")
def model():
    return files.read_imagereward(files.find_files(str(FOLDER)), sizes=SIZES)


@pytest.fixture(scope="module")
def tokens():
    tokenizer = files.read_wordpiece(FOLDER / "vocab.txt", 147)
    return files.tokenize_wordpiece(tokenizer, CAPTIONS)


@pytest.fixture(scope="module")
def pixels(golden):
    return normalised(golden["ir_pil_uint8"].reshape(-1, 32, 3)).reshape(-1, 32, 32, 3)


@pytest.fixture(scope="module")
def metric():
    return open_imagereward(str(FOLDER), sizes=SIZES, batch_size=64)


def copied(folder, change=None):
    """A copy of the files, the state dict in it ``change``d."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    if change is not None:
        weights = torch.load(folder / "ImageReward.pt", weights_only=True)
        change(weights)
        (folder / "ImageReward.pt").unlink()
        torch.save(weights, folder / "ImageReward.pt")
    return str(folder)


def test_tokens(golden, tokens):
    np.testing.assert_array_equal(tokens[0], golden["ir_ids"])
    np.testing.assert_array_equal(tokens[1], golden["ir_mask"])


def test_no_token_is_replaced_and_the_added_ones_are_last(tokens):
    tokenizer = files.read_wordpiece(FOLDER / "vocab.txt", 147)
    assert (tokens[0][:, 0] == tokenizer.cls_token_id).all()
    assert tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [145, 146]


def test_crops(golden, pictures):
    crops = np.stack([pil_crop(picture, 32, TORCHVISION) for picture in pictures])
    np.testing.assert_array_equal(crops, golden["ir_pil_uint8"])
    np.testing.assert_array_equal(normalised(crops[0])[None], golden["ir_pixels"])


@pytest.mark.parametrize(
    ("shape", "corner"), [((40, 64), (0, 12)), ((64, 40), (12, 0)), ((43, 40), (2, 0)), ((40, 41), (0, 0))]
)
def test_the_crop_is_in_the_middle(shape, corner):
    """At the shorter side's own length nothing is resized; half a pixel goes to the even number."""
    rows, columns = np.indices(shape)
    places = np.stack([rows, columns, rows], axis=-1).astype(np.uint8)
    found = pil_crop(places, 40, TORCHVISION)
    assert found.shape == (40, 40, 3)
    np.testing.assert_array_equal(found[0, 0, :2], corner)


def test_picture_tokens(golden, model, pixels):
    network, params = model
    found = network.apply({"params": params}, pixels, method="picture_tokens")
    np.testing.assert_allclose(found[:, 0], golden["ir_vit_cls"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[golden["ir_pairs"][:, 0]], golden["ir_vit_hidden"], rtol=0, atol=1e-4)


def test_hidden_states_of_the_text(golden, model, pixels, tokens):
    network, params = model
    which, caption = golden["ir_pairs"].T
    inputs = pixels[which], tokens[0][caption], tokens[1][caption]
    _, kept = network.apply({"params": params}, *inputs, capture_intermediates=True, mutable=["intermediates"])
    text = kept["intermediates"]["blip"]["text_encoder"]
    hidden = [text["embeddings"], *(text["encoder"][f"layer_{i}"] for i in range(2))]
    found = np.stack([one["__call__"][0] for one in hidden])
    np.testing.assert_allclose(found, golden["ir_bert_hidden"], rtol=0, atol=1e-4)


def test_rewards(golden, metric, pictures):
    every = [(picture, caption) for picture in pictures for caption in CAPTIONS]
    found = metric.score(*zip(*every, strict=True))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.reshape(golden["ir_reward"].shape), golden["ir_reward"], rtol=0, atol=1e-4)


def test_a_picture_is_scored_with_its_own_prompt_whatever_the_batch(golden, pictures):
    metric = open_imagereward(str(FOLDER), sizes=SIZES, batch_size=4)
    found = metric.score(pictures, CAPTIONS[: len(pictures)])
    np.testing.assert_allclose(found, golden["ir_reward"].diagonal(), rtol=0, atol=1e-4)
    assert metric.score([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        metric.score(pictures[:2], ["a cat"])


def test_all_batches_are_one_program(monkeypatch, model, pictures):
    network, params = model
    traced = []

    class Counted:
        text_encoder = network.text_encoder

        def apply(self, variables, *inputs):
            traced.append([x.shape for x in inputs])
            return network.apply(variables, *inputs)

    monkeypatch.setattr(imagereward, "read_imagereward", lambda *a, **k: (Counted(), params))
    metric = open_imagereward(str(FOLDER), sizes=SIZES, batch_size=4)
    for count in (1, 6, 4):
        assert metric.score(pictures[:count], CAPTIONS[:count]).shape == (count,)
    assert traced == [[(4, 32, 32, 3), (4, 35), (4, 35)]]


def test_bfloat16_is_near(golden, pictures):
    metric = open_imagereward(str(FOLDER), jnp.bfloat16, sizes=SIZES)
    found = metric.score(pictures, CAPTIONS[: len(pictures)])
    assert metric.settings["dtype"] == "bfloat16"
    assert 1e-4 < np.abs(found - golden["ir_reward"].diagonal()).max() < 0.1


def test_what_is_stored_with_a_number(metric):
    assert metric.settings["sha256 of ImageReward.pt"] == (
        "41a748240c12f32ff687d087ad98017dd1b96f5732a310997a956e24774742ee"
    )
    assert {"sha256 of med_config.json", "sha256 of vocab.txt", "resize", "scale", "dtype"} <= set(metric.settings)


def test_a_long_prompt_is_said_to_be_cut(metric, pictures, capsys):
    metric.score(pictures[:1], [CAPTIONS[9]])
    assert "1 of 1 prompts are longer than the 35 tokens" in capsys.readouterr().err


def remove(key):
    return lambda weights: weights.pop(key)


def put(key, *shape):
    return lambda weights: weights.update({key: torch.zeros(*shape)})


NORM = "blip.visual_encoder.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(NORM), f"has no key '{NORM}', which ImageReward v1.0 has"),
        (remove("mlp.layers.7.bias"), "has no key 'mlp.layers.7.bias'"),
        (put(NORM, 17), rf"'{NORM}' has shape \(17,\), but ImageReward v1.0 with med_config.json has \(16,\)"),
        (put("blip.itm_head.weight", 2, 24), "has 1 keys that ImageReward v1.0 does not have, such as 'blip.itm_head"),
        (lambda weights: weights[NORM].fill_(float("nan")), "not finite"),
        (lambda weights: weights.clear(), "has no key"),
    ],
)
def test_other_weights_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        open_imagereward(copied(tmp_path, change), sizes=SIZES)


@pytest.mark.parametrize("key", ["blip.text_encoder.embeddings.position_ids", "blip.vision_proj.weight"])
def test_what_is_not_used_need_not_be_there(tmp_path, key):
    open_imagereward(copied(tmp_path, remove(key)), sizes=SIZES)


@pytest.mark.parametrize("name", ["ImageReward.pt", "med_config.json"])
def test_a_missing_file(tmp_path, name):
    folder = copied(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} does not exist"):
        open_imagereward(folder, sizes=SIZES)


def test_a_folder_without_vocabulary_takes_that_of_bert(tmp_path, monkeypatch):
    folder = copied(tmp_path / "own")
    words = shutil.move(tmp_path / "own" / "vocab.txt", tmp_path / "bert.txt")
    asked = []
    monkeypatch.setattr(files, "resolve_model", lambda name: asked.append(name) or Path(words))
    assert files.find_files(folder).vocabulary == tmp_path / "bert.txt"
    assert asked == [files.BERT_VOCABULARY]


def test_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"hf download zai-org/ImageReward ImageReward.pt"):
        open_imagereward()
    folder = copied(tmp_path / "own")
    (tmp_path / "own" / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"has no vocab.txt.*hf download google-bert/bert-base-uncased vocab.txt"):
        open_imagereward(folder, sizes=SIZES)


def test_the_cache_of_the_hub(tmp_path, monkeypatch):
    """With the files of both repositories there, nothing is fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr(files, "BERT_VOCABULARY", files.BERT_VOCABULARY.partition("#")[0])
    monkeypatch.setattr(download, "list_files", lambda *a, **k: [])
    for name, wanted in ((files.HUB, files.WEIGHTS), (files.HUB, files.CONFIG), (files.BERT_VOCABULARY, "vocab.txt")):
        path = download.local_path(hub.parse_remote(name), wanted)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER / wanted, path)
    assert open_imagereward(sizes=SIZES).settings["dtype"] == "float32"


@pytest.mark.parametrize("place", ["github:a/b@" + "0" * 40 + "/c.json", "datasets/a/b", "a/b@main/ImageReward.pt"])
def test_no_place_of_a_model(place):
    with pytest.raises(UserError, match="no repository of models"):
        open_imagereward(place)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "relu", "hidden_act = 'relu' is not supported"),
        ("is_something", 3, "'is_something' .* is not known"),
        ("hidden_size", -24, "hidden_size = -24 must be"),
        ("num_attention_heads", 5, "make no model"),
        ("num_hidden_layers", 3, "has no key .*layer.2"),
        ("vocab_size", 148, r"word_embeddings.weight' has shape \(147, 24\)"),
    ],
)
def test_another_config(tmp_path, field, value, message):
    folder = copied(tmp_path)
    config = json.loads((tmp_path / "med_config.json").read_text(encoding="utf-8")) | {field: value}
    (tmp_path / "med_config.json").unlink()
    (tmp_path / "med_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        open_imagereward(folder, sizes=SIZES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n", "has 6 words, but the text encoder has 147"),
        ("a\nb\n", r"has no line \[PAD\]"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_another_vocabulary(tmp_path, text, message):
    (tmp_path / "vocab.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        files.read_wordpiece(tmp_path / "vocab.txt", 147)
