"""Prompt files of one prompt a line, those that cannot be read, and the order of training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_jax.data import prompts
from spo_jax.errors import UserError


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=r"does not exist; give a text file with one prompt a line") as error:
            prompts.read_prompts(path)
        assert str(path) in str(error.value)


def test_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_BYTES", 10)
    (tmp_path / "p.txt").write_text("a fox\nowl\n", encoding="utf-8")
    assert prompts.read_prompts(tmp_path / "p.txt") == ["a fox", "owl"]
    (tmp_path / "p.txt").write_text("a fox\nowls\n", encoding="utf-8")
    with pytest.raises(UserError, match="larger than 10 bytes; split it"):
        prompts.read_prompts(tmp_path / "p.txt")


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("a fox", encoding="utf-8")

    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); check its permissions"):
        prompts.read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"caf\xe9", "byte 3 is 0xe9"),
        ("p.json", b"[", "not valid JSON"),
        ("p.json", b"", "is empty"),
        ("p.json", b"[" * 200_000, "not valid JSON"),
        ("p.json", b"[" + b"1" * 5000 + b"]", "not valid JSON"),
        ("p.json", b'["a fox", "a \\ud800 fox"]', "entry 1 is not valid Unicode"),
    ],
)
def test_content_that_is_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prompts.read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "name, text",
    [
        ("p.txt", "a fox\n\n  an owl \n"),
        ("p.txt", "\ufeffa fox\nan owl"),
        ("p.txt", "a fox\r\nan owl\r\n"),
        ("P.JSON", '["a fox", "an owl"]'),
    ],
)
def test_line_ends_blanks_a_mark_at_the_start_and_capitals_do_not_matter(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert prompts.read_prompts(tmp_path / name) == ["a fox", "an owl"]


def test_a_line_ends_at_a_newline_only(tmp_path):
    (tmp_path / "p.txt").write_text("a fox\u2028on teal\x0b\nan owl", encoding="utf-8")
    assert prompts.read_prompts(tmp_path / "p.txt") == ["a fox\u2028on teal", "an owl"]


@pytest.mark.parametrize("entries", ["3", '"a fox"', "null", '{"caption": "a fox"}'])
def test_json_that_is_no_list(tmp_path, entries):
    (tmp_path / "p.json").write_text(entries, encoding="utf-8")
    with pytest.raises(UserError, match="must hold a JSON list, not a"):
        prompts.read_prompts(tmp_path / "p.json")


@pytest.mark.parametrize("entry", ["3", "null", "[]", "{}", '{"caption": null}'])
def test_json_entry_that_is_no_caption(tmp_path, entry):
    (tmp_path / "p.json").write_text(f'["a fox", {entry}]', encoding="utf-8")
    with pytest.raises(UserError, match="entry 1 is neither a string nor an object"):
        prompts.read_prompts(tmp_path / "p.json")


@given(
    lines=st.lists(
        st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"]), min_size=1),
        min_size=1,
        max_size=9,
    )
)
def test_every_line_with_ink_is_a_prompt(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(["a fox", *lines]), encoding="utf-8", newline="")
    assert prompts.read_prompts(path) == ["a fox", *(line.strip() for line in lines if line.strip())]


@given(count=st.integers(1, 60), size=st.integers(1, 16), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
def test_no_prompt_is_shown_more_often_than_the_last_batch_needs(count, size, seed, epoch):
    batches = prompts.num_batches(count, size)
    rows = [prompts.batch_indices(count, size, seed, epoch * batches + i) for i in range(batches)]
    times = np.bincount(np.concatenate(rows), minlength=count)
    assert times.shape == (count,)
    assert times.sum() == batches * size
    assert times.max() - times.min() <= 1


def test_epochs_and_seeds_have_orders_of_their_own():
    def epoch(number, seed=0):
        return np.concatenate([prompts.batch_indices(64, 16, seed, 4 * number + i) for i in range(4)])

    np.testing.assert_array_equal(epoch(1), epoch(1))
    assert (epoch(0) != epoch(1)).any() and (epoch(0) != epoch(0, seed=1)).any()


# ------------------------------------------------------------------------------------------------ TensorFlow Datasets
def prepare(folder, feature, texts):
    """A data set as a user would have it: written by a builder, as ArrayRecord."""
    import tensorflow_datasets as tfds

    class MyPrompts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({feature: tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self):
            yield from ((i, {feature: text}) for i, text in enumerate(texts))

    builder = MyPrompts(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


@pytest.mark.parametrize("feature", ["caption", "prompt", "text"])
def test_prompts_of_a_data_set(tmp_path, feature):
    folder = prepare(tmp_path, feature, ["a fox", "ein Bär ", "", "一只猫"])
    for split in ("", "@validation"):
        assert sorted(prompts.read_prompts(f"tfds:{folder}{split}")) == ["a fox", "ein Bär", "一只猫"]


def test_a_data_set_that_cannot_be_used(tmp_path):
    folder = prepare(tmp_path, "title", ["a fox"])
    for source, words in (
        (f"tfds:{folder}", "none of the features caption, prompt, text"),
        (f"tfds:{folder}@test", "Unknown split 'test'"),
        ("tfds:no_such_data_set", "no_such_data_set"),
        (f"tfds:{tmp_path}", "cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            prompts.read_prompts(source)
    with pytest.raises(UserError, match="is empty"):
        prompts.read_prompts(f"tfds:{prepare(tmp_path / 'blank', 'caption', [' '])}")
