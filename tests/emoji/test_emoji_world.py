"""The emoji world: captions and their split, the tokenizer, and backgrounds of images, which need no font."""

import colorsys
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import transformers

from examples.emoji_world import pictures, tokenizer
from spo_jax.emoji import world
from spo_jax.errors import UserError
from spo_jax.formats.hub import local


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(folder)
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_concepts_are_distinct_single_characters():
    assert all(len(concept.char) == 1 for concept in world.CONCEPTS)
    assert len({concept.char for concept in world.CONCEPTS}) == len(world.CONCEPTS)
    assert len({concept.name for concept in world.CONCEPTS}) == len(world.CONCEPTS)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in world.words())


def test_split_is_a_partition_with_every_concept_and_colour_in_training():
    train, held_out = set(world.TRAIN_PROMPTS), set(world.HELD_OUT_PROMPTS)
    assert len(world.HELD_OUT_PROMPTS) == len(held_out) == world.NUM_HELD_OUT
    assert not train & held_out
    assert train | held_out == set(world.ALL_PROMPTS)
    assert {prompt.concept for prompt in train} == set(range(len(world.CONCEPTS)))
    assert {prompt.color for prompt in train} == set(range(len(world.COLORS)))
    assert set(world.SPO_PROMPTS) <= train


def test_shipped_prompts_are_those_of_the_world():
    files = world.prompt_files()
    for name, text in files.items():
        assert local(f"emoji:prompts/{name}").read_text(encoding="utf-8") == text
    held_out, training = (set(files[name].splitlines()) for name in ("held_out.txt", "spo.txt"))
    assert held_out and training and not held_out & training


def test_captions():
    by_name = {concept.name: index for index, concept in enumerate(world.CONCEPTS)}
    teal, orange = world.COLOR_NAMES.index("teal"), world.COLOR_NAMES.index("orange")
    assert world.caption(by_name["owl"], teal) == "an owl on a teal background"
    assert world.caption(by_name["unicorn"], orange) == "a unicorn on an orange background"
    assert len(set(world.captions(world.ALL_PROMPTS))) == len(world.ALL_PROMPTS)


def test_split_is_pinned():
    """A change of the split would let a base model trained before it see held-out captions."""
    assert world.captions(world.HELD_OUT_PROMPTS[:2]) == [
        "a monkey on a red background",
        "a monkey on a brown background",
    ]


def test_each_word_is_one_token(clip_tokenizer):
    for word in world.words():
        assert clip_tokenizer.tokenize(word) == [word + "</w>"]
    captions = world.captions(world.ALL_PROMPTS)
    for text, ids in zip(captions, clip_tokenizer(captions).input_ids, strict=True):
        assert len(ids) == len(text.split()) + 2 <= tokenizer.MAX_LENGTH
        assert clip_tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_special_tokens_and_size(clip_tokenizer):
    size = len(clip_tokenizer)
    assert size < 1200
    assert (clip_tokenizer.bos_token_id, clip_tokenizer.eos_token_id) == (size - 2, size - 1)
    assert clip_tokenizer.pad_token_id == clip_tokenizer.eos_token_id
    assert clip_tokenizer.model_max_length == tokenizer.MAX_LENGTH
    padded = clip_tokenizer("a fox", padding="max_length").input_ids
    assert len(padded) == tokenizer.MAX_LENGTH
    assert padded[0] == size - 2
    assert set(padded[3:]) == {size - 1}


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(text=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=8))
def test_any_text_has_tokens(clip_tokenizer, text):
    """No character is unknown: the bytes of the normalised text come back."""
    ids = clip_tokenizer(text, add_special_tokens=False).input_ids
    assert clip_tokenizer.eos_token_id not in ids
    normal = clip_tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert clip_tokenizer.decode(ids).replace(" ", "") == normal.replace(" ", "")


def test_tokenizer_files_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        tokenizer.write_tokenizer(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    vocabulary = json.loads((tmp_path / "a" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_overlapping_words_become_one_token():
    """Words in which the first merge of one crosses the pieces of another."""
    merges = tokenizer.learn_merges(["banana", "an", "ban", "nab", "aaa"])
    assert {"banana</w>", "an</w>", "ban</w>", "nab</w>", "aaa</w>"} <= {"".join(merge) for merge in merges}


def test_backgrounds_stay_within_their_colour():
    rng = np.random.default_rng(0)
    for index, name in enumerate(world.COLOR_NAMES):
        hue_range, saturation_range, value_range = world.COLORS[name]
        for shade in pictures.named_backgrounds(rng, np.full(50, index)):
            hue, saturation, value = colorsys.rgb_to_hsv(*shade)
            middle = sum(hue_range) / 2
            assert abs((hue - middle + 0.5) % 1 - 0.5) <= (hue_range[1] - hue_range[0]) / 2 + 1e-6
            assert saturation_range[0] - 1e-6 <= saturation <= saturation_range[1] + 1e-6
            assert value_range[0] - 1e-6 <= value <= value_range[1] + 1e-6


def test_missing_files_are_told():
    with pytest.raises(UserError, match="fonts-noto-color-emoji"):
        pictures.render_emoji("x", font_path="missing.ttf")
    with pytest.raises(UserError, match="unicode-cldr-core"):
        pictures.cldr_names("missing.xml")


def test_cldr_names(tmp_path):
    path = tmp_path / "en.xml"
    path.write_text(
        '<ldml><annotations><annotation cp="x">a | b</annotation><annotation cp="x" type="tts">letter x</annotation>'
        "</annotations></ldml>"
    )
    assert pictures.cldr_names(str(path)) == {"x": "letter x"}
