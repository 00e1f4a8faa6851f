"""What adapters do: pictures as diffusers makes them, strengths, and a start of training."""

import chex
import jax
import numpy as np
import pytest
import torch
from absl import flags
from absl.testing import flagsaver
from flax.traverse_util import flatten_dict
from PIL import Image

from spo_jax import generate
from spo_jax.errors import UserError
from spo_jax.formats.lora import read_adapters, read_lora, starting_lora
from spo_jax.formats.lora_write import KOHYA_FILE_NAME, write_kohya, write_lora
from spo_jax.formats.safetensors_io import write_tensors
from spo_jax.models.lora import TARGETS, init_lora
from tests import lora_files, pictures

STEPS = 2


@pytest.fixture(scope="module")
def adapters():
    return lora_files.random_adapters(pictures.emoji_pipeline().params)


@pytest.fixture(scope="module")
def with_adapters(adapters):
    picture = pictures.ours(adapters, steps=STEPS)
    without_text = pictures.ours({"unet": adapters["unet"]}, steps=STEPS)
    for other in (pictures.ours(steps=STEPS), without_text):
        assert np.abs(picture - other).max() > 10, "the adapters should show, those of the text encoder too"
    return picture


@pytest.mark.parametrize("form", ["diffusers", "kohya", "before peft", "bin", "workdir"])
def test_diffusers_makes_our_picture_with_adapters_of_all_layers(tmp_path, adapters, with_adapters, form):
    emoji = pictures.emoji_pipeline().params
    file = tmp_path / "a.safetensors"
    if form in ("diffusers", "workdir"):
        write_lora(tmp_path if form == "workdir" else file, adapters)
    if form == "kohya":
        write_kohya(file, adapters, emoji["unet"])
    if form == "workdir":  # diffusers, and we, must find the right one of the two files of a run by themselves
        weaker = jax.tree.map(lambda x: x / 2, adapters)
        write_kohya(tmp_path, weaker, emoji["unet"])
        assert {p.name for p in tmp_path.iterdir()} == {"pytorch_lora_weights.safetensors", KOHYA_FILE_NAME}
        chosen = read_lora(tmp_path / "pytorch_lora_weights.safetensors", emoji)
        chex.assert_trees_all_equal(read_lora(tmp_path, emoji), chosen)
    if form == "before peft":
        write_tensors(file, lora_files.spelled(form, adapters, emoji))
    if form == "bin":
        file = tmp_path / "pytorch_lora_weights.bin"
        tensors = lora_files.spelled("before peft", adapters, emoji)
        torch.save({k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, file)
    theirs = pictures.theirs(lora_file=tmp_path if form == "workdir" else file, steps=STEPS)
    assert np.abs(theirs - with_adapters).max() <= 2


@pytest.mark.filterwarnings("ignore:Already found a .peft_config.")
def test_several_adapters_with_strengths_are_set_adapters_of_diffusers(tmp_path, adapters):
    emoji = pictures.emoji_pipeline().params
    other = lora_files.random_adapters(
        emoji, rank=2, seed=7, only=lambda part, path: path[-1] in ("to_q", "fc1", "conv2")
    )
    write_lora(tmp_path / "a", adapters)
    write_kohya(tmp_path / "b.safetensors", other, emoji["unet"])
    sum_of_both = read_adapters([f"{tmp_path}/a:0.7", f"{tmp_path}/b.safetensors:-1.5"], emoji)
    ours = pictures.ours(sum_of_both, steps=STEPS)
    files = {tmp_path / "a" / "pytorch_lora_weights.safetensors": 0.7, tmp_path / "b.safetensors": -1.5}
    assert np.abs(pictures.theirs(lora_file=files, steps=STEPS) - ours).max() <= 2
    assert np.abs(pictures.ours(adapters, steps=STEPS) - ours).max() > 10, "the strengths should show"


def test_training_starts_from_adapters_of_any_layer_and_rank(tmp_path, capsys):
    unet = pictures.emoji_pipeline().params["unet"]
    lora = lora_files.random_adapters({"unet": unet}, only=lambda part, path: path[-1] in ("to_q", "conv1", "net_2"))
    write_kohya(tmp_path / "a.safetensors", lora, unet)
    key = jax.random.key(3)
    start = flatten_dict(starting_lora(key, unet, 4, f"{tmp_path}/a.safetensors:0.5"))
    fresh, read = flatten_dict(init_lora(key, unet, 4)), flatten_dict(lora["unet"])
    assert start.keys() == fresh.keys() | read.keys()
    for path, value in start.items():
        expected = read.get(path, fresh.get(path)) * np.float32(0.5 if path in read and path[-1] == "B" else 1)
        np.testing.assert_array_equal(value, expected, err_msg=str(path))
    line = capsys.readouterr().err
    assert "keep rank 2 and 3, where config.lora.rank is 4" in line and line.count("\n") == 1
    assert f"{sum(p[-1] == 'A' and p[-2] not in TARGETS for p in read)} layers beyond the attention" in line


def test_a_start_with_a_text_encoder_is_refused_and_told_the_way(tmp_path):
    emoji = pictures.emoji_pipeline().params
    lora = lora_files.random_adapters(emoji, only=lambda part, path: path[-1] in ("to_q", "fc1"))
    write_lora(tmp_path, lora)
    with pytest.raises(UserError, match=r"adapts the text encoder too .* --format=pipeline, and train on that model"):
        starting_lora(jax.random.key(0), emoji["unet"], 4, str(tmp_path))


def test_generate_sums_adapters_with_their_strengths(tmp_path):
    emoji = pictures.emoji_pipeline().params
    only = {
        "unet": lambda part, path: path[-1] == "conv_in",
        "both": lambda part, path: "attn1" in path,
    }
    for seed, (name, some) in enumerate(only.items()):
        write_lora(tmp_path / f"{name}.safetensors", lora_files.random_adapters(emoji, seed=seed, only=some))
    names = [f"{tmp_path}/unet.safetensors:-1.5", f"{tmp_path}/both.safetensors"]
    write_lora(tmp_path / "sum.safetensors", read_adapters(names, emoji))

    def picture(lora):
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        given = {"lora": lora, "prompt": ["a fox"], "steps": 1, "out": str(tmp_path / "x.png")}
        with flagsaver.flagsaver(**given):
            generate.main()
        return np.asarray(Image.open(tmp_path / "x.png")).astype(int)

    summed = picture(names)
    assert np.abs(summed - picture([str(tmp_path / "sum.safetensors")])).max() <= 1
    assert np.abs(summed - picture([names[0].replace("-1.5", "1.5"), names[1]])).max() > 2
