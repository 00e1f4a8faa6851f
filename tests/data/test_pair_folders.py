"""A plain folder of pairs: chosen/ and rejected/, captions in files or names; what is refused, in one sentence."""

import os

import pytest

from spo_jax.data import pair_folders
from spo_jax.data.records import fault_of
from spo_jax.data.sources import open_source
from spo_jax.errors import UserError
from tests.preference_data import picture


def write(folder, chosen, rejected=None, **texts):
    """A folder with pictures of these names; ``texts`` by path, with __ for a slash and _txt for the ending."""
    for part, names in (("chosen", chosen), ("rejected", chosen if rejected is None else rejected)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            (folder / part / name).write_bytes(picture(len(part) + number))
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/').removesuffix('_txt')}.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def read(folder):
    source = open_source(str(folder))
    records = list(source.read())
    assert len(records) == source.num_records
    return records


def captions(folder):
    return [record["caption"].decode() for record in read(folder)]


def refused(message, folder):
    with pytest.raises(UserError, match=message) as error:
        open_source(str(folder))
    assert "\n" not in str(error.value)


def test_pairs_of_pictures_of_one_name(tmp_path):
    names = ["b fox.png", "a fox.JPG", "c.d.webp"], ["a fox.jpeg", "b fox.webp", "c.d.png"]
    folder = write(tmp_path, *names, chosen__ignored_txt="", prompt_txt="a fox")
    (folder / "chosen" / ".DS_Store.png").write_bytes(b"")
    (folder / "chosen" / "notes.md").write_text("")
    first, second, third = read(folder)
    assert first["image_0"] == picture(6 + 1) and first["image_1"] == picture(8)
    assert second["image_0"] == picture(6) and third["image_1"] == picture(8 + 2)
    for record in (first, second, third):
        assert (record["label_0"], record["label_1"], record["has_label"]) == (1, 0, True)
        assert record["caption"] == b"a fox" and record["num_example_per_prompt"] == 3
        assert fault_of(record) is None


def test_captions_beside_the_pictures_come_first(tmp_path):
    folder = write(tmp_path, ["a.png", "b.png", "c_owl.png"], chosen__a_txt="\ufeff a fox\n", chosen__b_txt=" ein Bär ")
    assert captions(folder) == ["a fox", "ein Bär", "c owl"]
    write(folder, [], prompt_txt="\ufeffan owl\r\n\r\n")
    assert captions(folder) == ["a fox", "ein Bär", "an owl"]
    write(folder, [], rejected__c_owl_txt="not read")
    assert captions(folder)[2] == "an owl"


@pytest.mark.parametrize(
    "name, caption",
    [
        ("a_fox_01", "a fox"),
        ("a fox-2", "a fox"),
        ("a fox (3)", "a fox"),
        ("a fox(12)", "a fox"),
        ("a_red_fox", "a red fox"),
        ("fox_1_2", "fox 1"),
        ("route 66", "route 66"),
        ("catch-22_01", "catch-22"),
        ("ein_Bär_1", "ein Bär"),
    ],
)
def test_a_name_is_a_caption(tmp_path, name, caption):
    assert captions(write(tmp_path, [f"{name}.png"])) == [caption]


def test_pairs_of_a_caption_are_counted(tmp_path):
    records = read(write(tmp_path, ["fox_1.png", "fox_2.png", "owl.png"]))
    assert [record["num_example_per_prompt"] for record in records] == [2, 2, 1]


def test_what_is_wrong_with_a_caption_file_is_a_fault_of_its_record(tmp_path):
    texts = {"chosen__a_txt": " \n", "chosen__b_txt": b"caf\xe9", "chosen__c_txt": "a" * 200_000}
    faults = [fault_of(record) for record in read(write(tmp_path, ["a.png", "b.png", "c.png"], **texts))]
    assert faults == ["caption_missing", "caption_broken", "caption_broken"]


def test_a_table_comes_first(tmp_path):
    write(tmp_path, ["a fox.png"])
    (tmp_path / "pairs.jsonl").write_text('{"caption": "b", "image_a": "1", "image_b": "2", "label": 0}')
    assert captions(tmp_path) == ["b"]


def test_a_picture_without_a_partner(tmp_path):
    write(tmp_path, ["a.png", "b.png", "c.png"], ["a.png", "d.png"])
    refused(r"has 3 without a partner .* such as chosen/b.png, which rejected/ lacks", tmp_path)
    refused("has 1 without a partner .* such as rejected/b.webp, which chosen", write(tmp_path / "n", [], ["b.webp"]))


def test_two_pictures_of_a_name(tmp_path):
    refused(r"rejected has a.jpg and a.png; leave one", write(tmp_path, ["a.png"], ["a.png", "a.jpg"]))


def test_folders_without_pictures(tmp_path):
    refused("has no pictures in chosen/ and rejected/; put .png, .jpg, .jpeg or .webp files", write(tmp_path, []))
    (tmp_path / "rejected").rmdir()
    refused("has no rejected/; it needs", tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b" \n", "is empty; it must hold one line"),
        (b"caf\xe9", r"is not UTF-8 \(.*\); it must hold one line"),
        (b"\xff\xfea\0", "is not UTF-8"),
        (b"a fox\nan owl\n", r"has 2 lines; it must hold one line of UTF-8 text, .*chosen/NAME.txt"),
        (b"a" * 200_000, "is longer than 100000 bytes"),
    ],
)
def test_a_prompt_file_that_is_no_caption(tmp_path, content, message):
    refused(rf"prompt.txt {message}", write(tmp_path, ["a.png"], prompt_txt=content))


@pytest.mark.parametrize("name", ["0001", "_01", "12-3", "___"])
def test_a_name_that_is_no_caption(tmp_path, name):
    refused(f"the picture '{name}' has no caption.*prompt.txt, or its own into", write(tmp_path, [f"{name}.png"]))
    assert captions(write(tmp_path, [], prompt_txt="a fox")) == ["a fox"]


def test_links_that_lead_elsewhere(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(picture())
    for number, name in enumerate(("chosen/a.png", "rejected/a.png", "chosen/a.txt", "prompt.txt")):
        folder = write(tmp_path / str(number), ["a.png"])
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        refused(f"{name} is a link that leads out of", folder)
    folder = write(tmp_path / "within", ["a.png"])
    (folder / "chosen" / "a.png").unlink()
    (folder / "chosen" / "a.png").symlink_to(folder / "rejected" / "a.png")
    assert read(folder)[0]["image_0"] == picture(8)


def test_a_pipe_is_no_picture_and_no_caption(tmp_path):
    folder = write(tmp_path, [], ["a.png"])
    os.mkfifo(folder / "chosen" / "a.png")
    os.mkfifo(folder / "chosen" / "a.txt")
    os.mkfifo(folder / "prompt.txt")
    assert [fault_of(record) for record in read(folder)] == ["picture_missing"]


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_folders, "_MAX_FILES", 2)
    refused("chosen has more than 2 files; split it", write(tmp_path, ["a.png", "b.png", "c.png"]))


def test_names_that_are_no_text(tmp_path):
    for part in ("chosen", "rejected"):
        (tmp_path / part).mkdir()
        (tmp_path / part / os.fsdecode(b"caf\xe9.png")).write_bytes(picture())
    (record,) = read(tmp_path)
    assert record["caption"] == b"caf\xe9" and fault_of(record) == "caption_broken"
