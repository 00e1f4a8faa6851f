"""Exports hold each image where the benchmark looks for it, and refuse what it would read wrongly."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from spo_jax.errors import UserError
from spo_jax.evaluation.layouts import (
    export_geneval,
    export_hpsv2,
    export_t2i_compbench,
    image_path,
    read_geneval_metadata,
)
from spo_jax.images import write_png

PROMPTS = ["a red cat", "two dogs, one blue", "a bowl left of a cup.", "Ein Bär"]


def shade(prompt_id, seed):
    return 20 * prompt_id + 3 * seed


@pytest.fixture
def out(tmp_path):
    """An evaluation of four prompts and four seeds; the shade of an image says which it is."""
    folder = tmp_path / "out"
    for i in range(len(PROMPTS)):
        for seed in range(4):
            write_png(image_path(folder, "tuned", i, seed), np.full((8, 8, 3), shade(i, seed), np.uint8))
    (folder / "prompts.json").write_text(json.dumps(PROMPTS), encoding="utf-8")
    return folder


def shade_of(path):
    return round(float(np.asarray(Image.open(path)).mean()))


def refused(words, function, *args, **options):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_hpsv2(out, tmp_path):
    prompts = export_hpsv2(out, "tuned", tmp_path / "hps/tuned", seed=2, per_style=2, styles=("anime", "photo"))
    assert sorted(path.name for path in (tmp_path / "hps/tuned").iterdir()) == ["anime", "photo"]
    for i in range(4):
        path = tmp_path / "hps/tuned" / ("anime", "photo")[i // 2] / f"{i % 2:05d}.jpg"
        assert abs(shade_of(path) - shade(i, 2)) <= 1
        with Image.open(path) as picture:
            assert picture.format == "JPEG"
    assert prompts == tmp_path / "hps/tuned_prompts"
    assert json.loads((prompts / "photo.json").read_text(encoding="utf-8")) == PROMPTS[2:]


def test_hpsv2_refuses(out, tmp_path):
    folder = tmp_path / "hps"
    refused("has 3200 prompts, 800 of each of anime,", export_hpsv2, out, "tuned", folder)
    refused("only of tuned", export_hpsv2, out, "base", folder)
    refused("4 of 4 images of model tuned are missing", export_hpsv2, out, "tuned", folder, seed=9)
    image_path(out, "tuned", 1, 0).unlink()
    refused("1 of 4 images of model tuned are missing, the first", export_hpsv2, out, "tuned", folder)
    assert not folder.exists()


def test_geneval(out, tmp_path):
    lines = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": prompt} for prompt in PROMPTS
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    metadata = read_geneval_metadata(tmp_path / "metadata.jsonl")
    export_geneval(out, "tuned", tmp_path / "geneval", metadata=metadata)
    for i in range(4):
        folder = tmp_path / "geneval" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text(encoding="utf-8")) == lines[i]
        assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"{k:04d}.png" for k in range(4)]
        assert [shade_of(folder / "samples" / f"{k:04d}.png") for k in range(4)] == [shade(i, k) for k in range(4)]


def test_geneval_refuses(out, tmp_path):
    lines = [{"prompt": prompt} for prompt in PROMPTS]
    folder = tmp_path / "geneval"
    refused("of 3 prompts, but", export_geneval, out, "tuned", folder, metadata=lines[:3])
    refused("takes 4 images of a prompt", export_geneval, out, "tuned", folder, metadata=lines, seeds=(0, 1))
    turned = [*lines[:2], lines[3], lines[2]]
    refused("Prompt 2 of", export_geneval, out, "tuned", folder, metadata=turned)
    folder.mkdir()
    (folder / "mine").write_text("")
    refused("is there already", export_geneval, out, "tuned", folder, metadata=lines)
    assert [path.name for path in folder.iterdir()] == ["mine"]
    refused("cannot be read as GenEval's metadata", read_geneval_metadata, out / "prompts.json")


def test_t2i_compbench(out, tmp_path):
    """As the benchmark reads it: in the order of the numbers, the prompt up to the first underscore."""
    export_t2i_compbench(out, "tuned", tmp_path / "comp", seeds=range(4), images=4)
    names = sorted((tmp_path / "comp/samples").iterdir(), key=lambda path: int(path.stem.split("_")[-1]))
    assert [path.name.split("_")[0] for path in names] == [prompt for prompt in PROMPTS for _ in range(4)]
    assert [shade_of(path) for path in names] == [shade(i, k) for i in range(4) for k in range(4)]
    assert names[5].name == "two dogs, one blue_000005.png"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("either/or", "a slash"),
        ("snake_case", "an underscore"),
        ("", "it is empty"),
        (".hidden", "begins with a dot"),
        ("ä" * 123, "257 bytes of at most 255"),
    ],
)
def test_t2i_compbench_refuses_prompts(out, tmp_path, prompt, words):
    (out / "prompts.json").write_text(json.dumps([*PROMPTS[:3], prompt]), encoding="utf-8")
    refused(words, export_t2i_compbench, out, "tuned", tmp_path / "comp", seeds=range(4), images=4)
    assert not (tmp_path / "comp").exists()


def test_t2i_compbench_refuses_too_few_seeds(out, tmp_path):
    refused("takes 10 images of a prompt", export_t2i_compbench, out, "tuned", tmp_path / "comp", seeds=range(4))


def test_a_folder_that_is_no_evaluation(tmp_path):
    refused("cannot be read as the prompts", export_hpsv2, tmp_path, "tuned", tmp_path / "hps")


def test_a_broken_image_leaves_no_folder(out, tmp_path):
    image_path(out, "tuned", 3, 0).write_bytes(b"no picture")
    folder = tmp_path / "hps/tuned"
    refused("cannot be read as an image", export_hpsv2, out, "tuned", folder, per_style=2, styles=("anime", "photo"))
    assert not folder.exists() and not list((tmp_path / "hps").iterdir())
