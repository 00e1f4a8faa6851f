"""Tokenizers as pipelines have them, and as a stranger's pipeline may have them: lengths, ids, and what is cut off."""

import json
import shutil

import numpy as np
import pytest
import transformers
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from spo_jax.errors import UserError
from spo_jax.formats.hub import local
from spo_jax.formats.pipeline import read_pipeline
from spo_jax.formats.tokenizers import (
    check_lengths,
    cut_off,
    cut_warning,
    fitted,
    read_tokenizer,
    tokenize,
    tokenize_prompts,
)
from spo_jax.models import CLIPTextModel
from spo_jax.sampling.encode import encode_prompts, make_encode
from tests.small_pipeline import small_pipeline

EMOJI = local("emoji:model/tokenizer")
LONG = "a red fox and a green apple and a blue owl on a teal background"
TOWER = CLIPTextModel.from_config(json.loads(local("emoji:model/text_encoder/config.json").read_text())).tower


@pytest.fixture
def changed(tmp_path):
    """Makes a copy of the tokenizer whose config has other values; those that are ... are left out."""

    def change(**values):
        folder = shutil.copytree(EMOJI, tmp_path / "tokenizer")
        (folder / "special_tokens_map.json").unlink()
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) | values
        config = {name: value for name, value in config.items() if value is not ...}
        file.write_text(json.dumps(config), encoding="utf-8")
        return folder

    return change


@pytest.mark.parametrize(("length", "expected"), [(..., 16), (10**30, 16), (77, 16), (16, 16), (9, 9)])
def test_texts_are_as_long_as_tokenizer_and_positions_allow(changed, length, expected):
    tokenizer = read_tokenizer(changed(model_max_length=length), TOWER)
    ids = tokenize(tokenizer, ["a fox", LONG])
    assert ids.shape == (2, expected) and ids.dtype == np.int32
    plain = transformers.CLIPTokenizer.from_pretrained(EMOJI)
    theirs = plain(["a fox", LONG], padding="max_length", truncation=True, max_length=expected)["input_ids"]
    np.testing.assert_array_equal(ids, theirs)


@pytest.mark.parametrize("length", [0, 1, -3, "77", None])
def test_a_length_that_is_none_is_refused(changed, length):
    if length is None:  # as if it was missing
        assert read_tokenizer(changed(model_max_length=None), TOWER).model_max_length == 16
        return
    with pytest.raises(UserError, match=r"model_max_length is .*; it must be a number of tokens from 2"):
        read_tokenizer(changed(model_max_length=length), TOWER)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pad_token": "<new>"}, "token '<new>' has id 1101, but the text encoder knows ids up to 1100 only"),
        ({"eos_token": "<new>"}, "token '<new>' has id 1101"),
        ({"additional_special_tokens": ["<style>"]}, "token '<style>' has id 1101"),
        ({"pad_token": None}, "has no pad_token"),
        ({"eos_token": None}, "cannot be read"),
        ({"eos_token": 3}, "cannot be read"),
    ],
)
def test_tokens_that_the_text_encoder_does_not_know_are_refused(changed, values, words):
    with pytest.raises(UserError) as error:
        read_tokenizer(changed(**values), TOWER)
    assert words in str(error.value) and "tokenizer" in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("file", "content"), [("vocab.json", b"{"), ("vocab.json", b"[]"), ("merges.txt", b"\xff")])
def test_a_damaged_file_is_told(changed, file, content):
    folder = changed()
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=r"Tokenizer .* cannot be read .*; download or copy it again"):
        read_tokenizer(folder)


def test_a_pipeline_without_its_tokenizer_is_told(tmp_path):
    folder = shutil.copytree(small_pipeline(), tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError) as error:
        read_pipeline(folder)
    assert str(error.value) == f"Tokenizer {folder / 'tokenizer'} does not exist; is {folder} a complete model folder?"


def test_a_pipeline_with_a_tokenizer_without_a_length_encodes_as_with_one(tmp_path):
    folder = shutil.copytree(small_pipeline(), tmp_path / "model")
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["model_max_length"]
    file.write_text(json.dumps(config), encoding="utf-8")
    embeddings = []
    for path in (folder, small_pipeline()):
        pipeline = read_pipeline(path)
        assert [len(ids[0]) for ids in tokenize_prompts(pipeline, [LONG])] == [16]
        encode = make_encode(pipeline, scorer=None)
        embeddings.append(encode_prompts(encode, pipeline.params, pipeline, None, [LONG]).embeddings)
    np.testing.assert_array_equal(*embeddings)


def test_tokenizers_of_different_lengths_do_not_make_a_pipeline(changed):
    first, second = read_tokenizer(EMOJI), read_tokenizer(changed(model_max_length=9))
    check_lengths({"tokenizer": first})
    check_lengths({"tokenizer": first, "tokenizer_2": first})
    with pytest.raises(UserError, match="different lengths, tokenizer 16 and tokenizer_2 9; set model_max_length"):
        check_lengths({"tokenizer": first, "tokenizer_2": second})


def test_a_scorer_with_fewer_positions_has_a_tokenizer_of_its_own():
    tokenizer = read_tokenizer(EMOJI)
    assert fitted(tokenizer, TOWER.clone(max_position_embeddings=8)).model_max_length == 8
    assert tokenizer.model_max_length == 16
    with pytest.raises(UserError, match="knows ids up to 99 only"):
        fitted(tokenizer, TOWER.clone(vocab_size=100))


def test_what_is_cut_off_is_what_diffusers_names(caplog):
    pipeline = StableDiffusionPipeline.from_pretrained(small_pipeline())
    diffusers_logging.enable_propagation()
    pipeline.encode_prompt([LONG], "cpu", 1, False)
    tokenizer = read_tokenizer(small_pipeline() / "tokenizer", TOWER)
    (end,) = cut_off(tokenizer, [LONG])
    assert end and f"['{end}']" in caplog.text
    assert cut_off(tokenizer, ["a fox", LONG, ""]) == ["", end, ""]


def test_a_warning_counts_each_text_once_and_names_some():
    tokenizer = read_tokenizer(EMOJI)
    assert cut_warning([tokenizer], ["a fox", ""]) is None and cut_warning([tokenizer], []) is None
    assert cut_warning([tokenizer, tokenizer], ["a fox", LONG, LONG], "captions").startswith(
        "warning: 1 of 2 captions are longer than the 16 tokens that the text encoder reads; their ends are not seen: '"
    )
    many = cut_warning([tokenizer], [f"{LONG} {i}" for i in range(5)])
    assert "5 of 5 prompts" in many and many.endswith("2' and 2 more.")
