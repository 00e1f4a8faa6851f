"""What the export command writes, loaded by diffusers and peft: the same picture as ours, at most 2/255 apart."""

import functools
import json
import shutil
import sys

import chex
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from spo_jax.diffusion.schedule import FILE
from spo_jax.formats.lora_write import write_kohya, write_lora
from spo_jax.formats.pipeline import open_pipeline, read_pipeline
from spo_jax.formats.write_checkpoint import write_checkpoint
from spo_jax.models.lora import merge_lora
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


@pytest.fixture(scope="module")
def merged():
    """The parameters of each part that the workdir's adapters are for, with these."""
    params = pictures.emoji_pipeline().params
    return {part: merge_lora(params[part], lora) for part, lora in random_adapters(params).items()}


def export(**flags):
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return run([sys.executable, "-m", "spo_jax.export", *arguments], environment())


@pytest.mark.parametrize("form", ["diffusers", "kohya", "pipeline", "checkpoint"])
def test_diffusers_makes_our_picture(workdir, with_adapters, tmp_path, form):
    out = tmp_path / "deep" / ("model" if form == "pipeline" else "spo.safetensors")
    result = export(lora=workdir, format=form, out=out)
    assert result.returncode == 0, result.stderr
    # The shipped model's sizes are not those of a published one: its configs and tokenizer go beside the single file.
    assert {p.name for p in out.parent.iterdir()} == {out.name} | ({"spo.config"} if form == "checkpoint" else set())
    if form == "checkpoint":
        source = {"single_file": out}
        assert {value.dtype for value in safetensors.numpy.load_file(out).values()} == {np.dtype(np.float16)}
    else:
        source = {"folder": out} if form == "pipeline" else {"lora_file": out}
    theirs = pictures.theirs(**source, steps=STEPS)
    assert np.abs(theirs - with_adapters).max() <= 2


@pytest.mark.parametrize("dtype, tolerance", [("float32", 0), ("float16", 2)])
def test_the_same_picture_from_one_file(tmp_path, dtype, tolerance):
    path, emoji = tmp_path / "emoji.safetensors", pictures.emoji_pipeline()
    write_checkpoint(path, open_pipeline(MODEL), {}, dtype=np.dtype(dtype))
    pipeline = read_pipeline(path)
    for part in ("unet", "vae", "text_encoder", "image_size"):
        assert getattr(pipeline, part) == getattr(emoji, part), part
    assert pipeline.scheduler_config | {FILE: ""} == emoji.scheduler_config | {FILE: ""}
    assert pipeline.tokenizer(pictures.PROMPTS).input_ids == emoji.tokenizer(pictures.PROMPTS).input_ids
    assert np.abs(pictures.ours(params=pipeline.params) - pictures.ours()).max() <= tolerance


def test_kohya_to_diffusers_is_bit_exact(workdir, tmp_path):
    params = pictures.emoji_pipeline().params
    write_kohya(tmp_path / "theirs.safetensors", random_adapters(params), params["unet"])
    result = export(lora=tmp_path / "theirs.safetensors", model=MODEL, out=tmp_path / "o.safetensors")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "o.safetensors").read_bytes() == next(workdir.glob("*.safetensors")).read_bytes()


def test_a_single_file_takes_the_place_of_a_folder(workdir, merged, tmp_path):
    model, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    write_checkpoint(model, open_pipeline(MODEL), {}, dtype=np.dtype(np.float32))
    result = export(lora=workdir, model=model, format="checkpoint", dtype="float32", out=out)
    assert result.returncode == 0 and f"Wrote {out}." in result.stdout, result.stderr
    theirs = safetensors.numpy.load_file(out)
    parts = {part: functools.partial(merged.get, part) for part in merged}
    write_checkpoint(tmp_path / "ours.safetensors", open_pipeline(MODEL), parts, dtype=np.dtype(np.float32))
    for key, value in safetensors.numpy.load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(theirs[key], value)


def test_what_a_run_recorded_of_its_base_model_is_in_the_export(workdir, merged, tmp_path):
    """Half-precision names, another UNet as a trainer saves it, and another autoencoder."""
    model, run_folder, out = tmp_path / "model", tmp_path / "run", tmp_path / "out"
    shutil.copytree(MODEL, model)
    shutil.copytree(workdir, run_folder)
    vae = shutil.copytree(MODEL / "vae", tmp_path / "mine" / "vae")
    weights = vae / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["decoder.conv_out.bias"][:] = 0.125
    safetensors.numpy.save_file(tensors, weights)
    (model / "unet").rename(tmp_path / "mine" / "unet")
    for file in model.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    base = {"model": str(model), "variant": "fp16", "unet": str(tmp_path / "mine"), "vae": str(vae)}
    (run_folder / "config.json").write_text(json.dumps(base), encoding="utf-8")
    result = export(lora=run_folder, format="pipeline", out=out)
    assert result.returncode == 0, result.stderr
    ours = read_pipeline(out)
    np.testing.assert_array_equal(ours.params["vae"]["decoder"]["conv_out"]["bias"], np.full(3, 0.125, np.float32))
    for part, params in merged.items():
        chex.assert_trees_all_equal(ours.params[part], params)
    assert not list(out.rglob("*fp16*"))
    pipeline = StableDiffusionPipeline.from_pretrained(out, local_files_only=True)
    assert {p.dtype for p in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}


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
        ({"lora": "{run}", "model": "{}/full", "out": "{}/o.safetensors"}, ["full/model_index.json"]),
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
