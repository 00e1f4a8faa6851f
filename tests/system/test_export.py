"""What the export command writes, loaded by diffusers and peft: the same picture as ours, at most 2/255 apart."""

import json
import sys

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler

from spo_jax.checkpoints.lora_write import write_kohya, write_lora
from tests import pictures
from tests.lora_files import random_adapters
from tests.system.commands import ROOT, environment, run

STEPS = 2
MODEL = ROOT / "spo_jax" / "emoji" / "model"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What the command needs of a training run: adapters, here of all layers, and the config with the model."""
    folder = tmp_path_factory.mktemp("run")
    write_lora(folder, random_adapters(pictures.emoji_pipeline().params))
    (folder / "config.json").write_text(json.dumps({"model": "emoji:model"}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def with_adapters():
    picture = pictures.ours(random_adapters(pictures.emoji_pipeline().params), steps=STEPS)
    assert np.abs(picture - pictures.ours(steps=STEPS)).max() > 10, "the adapters should show"
    return picture


def export(**flags):
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return run([sys.executable, "-m", "spo_jax.export", *arguments], environment())


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline"])
def test_diffusers_makes_our_picture(workdir, with_adapters, tmp_path, form):
    out = tmp_path / "deep" / ("model" if form == "pipeline" else "spo.safetensors")
    result = export(lora=workdir, format=form, out=out)
    assert result.returncode == 0, result.stderr
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    source = {"folder": out} if form == "pipeline" else {"lora_file": out}
    theirs = pictures.theirs(**source, steps=STEPS)
    assert np.abs(theirs - with_adapters).max() <= 2


def test_kohya_to_diffusers_is_bit_exact(workdir, tmp_path):
    params = pictures.emoji_pipeline().params
    write_kohya(tmp_path / "theirs.safetensors", random_adapters(params), params["unet"])
    result = export(lora=tmp_path / "theirs.safetensors", model=MODEL, out=tmp_path / "o.safetensors")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "o.safetensors").read_bytes() == next(workdir.glob("*.safetensors")).read_bytes()


@pytest.mark.parametrize("steps", [8, 15])
def test_dpm_solver_makes_the_picture_of_diffusers(steps):
    """Below 15 steps and from there on, because diffusers lowers the order of the last steps below."""
    theirs = pictures.theirs(scheduler=DPMSolverMultistepScheduler, steps=steps)
    assert np.abs(theirs - pictures.ours(solver="dpmpp_2m", steps=steps)).max() <= 2


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"out": "{}/o.safetensors"}, ["--lora is missing"]),
        ({"lora": "{run}"}, ["--out is missing"]),
        ({"lora": "{run}:x", "out": "{}/o.safetensors"}, ["{run}:x", "the strength, a number"]),
        ({"lora": "{run}:nan", "out": "{}/o.safetensors"}, ["{run}:nan", "the strength, a number"]),
        ({"lora": "{run}", "out": "{}/folder"}, ["--out=", "safetensors", "--format=diffusers"]),
        ({"lora": "{run}", "out": "{}/o.safetensors", "format": "pipeline"}, ["new folder"]),
        ({"lora": "{run}", "out": "{}/full", "format": "pipeline"}, ["full", "not an empty folder"]),
        ({"lora": "{}/full/lora.safetensors", "out": "{}/o.safetensors"}, ["--model is missing"]),
        ({"lora": "{run}", "out": "{}/full/file/o.safetensors", "format": "kohya"}, ["cannot be written"]),
        ({"lora": "{run}", "model": "{}/full", "out": "{}/o.safetensors"}, ["full/unet/config.json"]),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(workdir, tmp_path, flags, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine", encoding="utf-8")
    result = export(**{k: v.replace("{run}", str(workdir)).format(tmp_path) for k, v in flags.items()})
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    for word in words:
        assert word.replace("{run}", str(workdir)) in line
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]
