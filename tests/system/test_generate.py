"""``spo_jax.generate``: what it says of prompts and output files, and what it refuses to write."""

import errno
import os
import shutil

import numpy as np
import PIL.Image
import pytest
from absl import flags
from absl.testing import flagsaver

from spo_jax import generate
from spo_jax.errors import UserError
from spo_jax.formats.safetensors_io import read_tensors, write_tensors
from tests.small_pipeline import small_pipeline

LONG = "a red fox and a green apple and a blue owl and a yellow star on a teal background with many more words"


def run(*arguments):
    """The command in this process, with few steps of a small model."""
    with flagsaver.flagsaver():
        flags.FLAGS(["generate", f"--model={small_pipeline()}", "--steps=2", *arguments])
        generate.main()


def refused(*arguments):
    with pytest.raises(UserError) as error:
        run(*arguments)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture
def damaged(tmp_path):
    """The pipeline, with finite weights in its decoder that make images which are not finite."""
    folder = shutil.copytree(small_pipeline(), tmp_path / "damaged")
    (file,) = (folder / "vae").glob("*.safetensors")
    tensors = read_tensors(file)
    tensors["decoder.conv_out.weight"] = np.full_like(tensors["decoder.conv_out.weight"], 3e38, np.float32)
    write_tensors(file, tensors)
    return folder


def test_what_is_cut_off_of_a_prompt_is_said_once(tmp_path, capfd):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(f'{{"caption": "{text}"}}' for text in ["a fox", LONG, LONG, "an owl"]), encoding="utf-8")
    run(f"--prompts_file={file}", f"--out={tmp_path / 'new' / 'x.png'}", "--batch_size=2")
    said = capfd.readouterr()
    assert said.err.count("spo_jax: warning: ") == 1 and "1 of 4 prompts are longer than the 16 tokens" in said.err
    assert "with many more words" in said.err and "Wrote 4 pictures" in said.out
    assert PIL.Image.open(tmp_path / "new" / "x.png").size == (70, 70)


def test_a_picture_that_is_not_finite_is_refused_by_its_prompt(tmp_path, damaged):
    out = tmp_path / "x.png"
    words = refused(f"--model={damaged}", "--prompt=a fox", "--prompt=an owl", f"--out={out}")
    assert "The picture of 'a fox' has numbers that are not finite, so nothing was written" in words
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file/x.png", "Not a directory"),
        ("file/below/x.png", "Not a directory"),
        ("folder.png", "Is a directory"),
        ("/proc/x.png", "cannot be written"),
        ("y" * 300 + ".png", "File name too long"),
        ("y" * 250 + ".png", "File name too long"),
        ("a\0b.png", "is no name that a file can have"),
        ("x.jpg", "must name a PNG file"),
        ("", "must name a PNG file"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_anything_is_read(tmp_path, monkeypatch, out, words):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    assert words in refused("--model=nowhere", "--prompt=a fox", f"--out={out}")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder.png"}


def test_a_disk_that_is_full_at_the_end_is_told(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("PIL.Image.Image.save", full)
    words = refused("--prompt=a fox", f"--out={tmp_path / 'x.png'}")
    assert f"--out={tmp_path / 'x.png'} cannot be written (No space left on device)" in words
    assert not list(tmp_path.iterdir())


def test_a_sheet_that_nobody_could_open_is_refused(tmp_path):
    prompts = [f"--prompt=a fox {i}" for i in range(30)]
    assert "more than 268435456; give fewer prompts or less --zoom" in refused(
        *prompts, "--zoom=100", f"--out={tmp_path / 'x.png'}"
    )


@pytest.mark.parametrize(
    "flag",
    [
        *("seed=-1", "seed=4294967296", "seed=4294967297", "steps=0", "steps=1001", "zoom=0", "zoom=101"),
        *("guidance_scale=-1", "guidance_scale=1e9", "eta=1.5", "eta=-0.1", "batch_size=0", "height=0", "width=-8"),
    ],
)
def test_numbers_out_of_range_are_refused(flag):
    with pytest.raises(flags.IllegalFlagValueError, match=f"--{flag.partition('=')[0]}="):
        run(f"--{flag}")


def test_the_largest_seed_has_a_picture_of_its_own(tmp_path):
    for seed in (2**32 - 1, 0, 2**31):
        run("--prompt=a fox", f"--seed={seed}", f"--out={tmp_path / f'{seed}.png'}")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 3


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model=", "--model or --lora is empty"),
        ("--lora=", "--model or --lora is empty"),
        ("--prompt=caf\udce9", "not valid UTF-8"),
        ("--negative_prompt=caf\udce9", "not valid UTF-8"),
    ],
)
def test_what_a_shell_leaves_of_a_value_is_not_taken_for_another(tmp_path, argument, words):
    assert words in refused(argument, "--prompt=a fox", f"--out={tmp_path / 'x.png'}")
