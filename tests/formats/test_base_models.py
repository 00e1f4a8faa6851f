"""Base models as people have them: variants, mixed folders, parts of others, configs of 2022; against diffusers."""

import json
import re
import shutil
import stat

import chex
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel

from spo_jax.errors import UserError
from spo_jax.formats.base import Base, base_of, base_of_config, read_base
from spo_jax.formats.hub import local
from spo_jax.formats.pipeline import read_clip, read_pipeline, with_image_size
from spo_jax.formats.write_pipeline import write_pipeline
from tests import pictures
from tests.small_pipeline import small_pipeline

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def model(tmp_path):
    """A pipeline to be changed."""
    return shutil.copytree(small_pipeline(), tmp_path / "model")


@pytest.fixture(scope="module")
def expected():
    """The parameters that it has."""
    return read_pipeline(small_pipeline()).params


def change(file, **fields):
    """Sets fields of a JSON file; None takes one away."""
    config = json.loads(file.read_text(encoding="utf-8")) | fields
    config = {name: value for name, value in config.items() if value is not None}
    file.write_text(json.dumps(config), encoding="utf-8")


def weights(folder, part, variant=""):
    return folder / part / f"{STEMS[part]}{variant and '.' + variant}.safetensors"


def only_fp16(folder, parts=tuple(STEMS)):
    for part in parts:
        weights(folder, part).rename(weights(folder, part, "fp16"))


def edit(file, edited):
    tensors = safetensors.numpy.load_file(file)
    edited(tensors)
    safetensors.numpy.save_file(tensors, file)


def loaded(folder, **options):
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)


# ---------------------------------------------------------------------------------------------------------- variants
def test_a_folder_with_one_variant_alone_is_read_and_says_so(model, expected, capsys):
    only_fp16(model)
    for variant in (None, "fp16"):
        pipeline = read_pipeline(model, variant=variant)
        chex.assert_trees_all_equal(pipeline.params, expected)
    lines = capsys.readouterr().err.splitlines()
    said = "only fp16 weights are there, so these are read."
    assert sorted(lines) == sorted(f"spo_jax: {model / part}: {said}" for part in STEMS)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_part_in_another_form_than_the_others_is_read_and_named(model, expected, capsys, variant):
    only_fp16(model, ["unet"])
    chex.assert_trees_all_equal(read_pipeline(model, variant=variant).params, expected)
    lines = capsys.readouterr().err.splitlines()
    named = ["unet"] if variant is None else ["vae", "text_encoder"]
    assert [line.removeprefix("spo_jax: ").partition(":")[0] for line in lines] == [str(model / part) for part in named]


def test_a_variant_that_no_part_has_is_refused(model):
    with pytest.raises(UserError, match=r"model\.fp32\.safetensors does not exist.*--variant"):
        read_pipeline(model, variant="fp32")


# ----------------------------------------------------------------------------------------------------- parts together
@pytest.mark.parametrize(
    "part, fields, words",
    [
        ("unet", {"in_channels": 9}, ["9 channels", "inpainting", "text-to-image"]),
        ("unet", {"in_channels": 8}, ["8 channels", "InstructPix2Pix"]),
        ("unet", {"in_channels": 3}, ["3 channels", "do not belong together"]),
        ("unet", {"out_channels": 8}, ["8 channels (out_channels)", "variance"]),
        ("unet", {"cross_attention_dim": 96}, ["128 channels", "cross_attention_dim", "96"]),
        ("vae", {"latent_channels": 16}, ["latents", "16"]),
        ("vae", {"in_channels": 1}, ["1 channels in"]),
        ("vae", {"scaling_factor": "0.1"}, ["scaling_factor = '0.1'", "above 0"]),
        ("vae", {"scaling_factor": 0}, ["scaling_factor = 0"]),
        ("unet", {"sample_size": 16.0}, ["sample_size = 16.0", "whole number"]),
        ("unet", {"sample_size": [16]}, ["sample_size = (16,)"]),
        ("unet", {"norm_eps": -1}, ["norm_eps = -1"]),
        ("unet", {"new_switch": True}, ["'new_switch'"]),
        ("scheduler", {"beta_wobble": 3}, ["scheduler_config.json", "'beta_wobble'"]),
        ("scheduler", {"_class_name": "EDMEulerScheduler", "beta_schedule": None}, ["scheduler_config", "EDMEuler"]),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_weights_are_read(model, part, fields, words):
    for name in STEMS:
        weights(model, name).write_bytes(b"not looked at")
    change(model / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **fields)
    with pytest.raises(UserError) as caught:
        read_pipeline(model)
    for word in [str(model / part), *words]:
        assert word in str(caught.value)


def test_switches_of_newer_versions_that_are_off_change_nothing(model):
    before = read_pipeline(model).unet
    for part in STEMS:
        change(model / part / "config.json", new_switch=False, new_list=[False, False])
    change(model / "unet" / "config.json", only_cross_attention=[False] * 4, dual_cross_attention=False)
    config = model / "unet" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes().replace(b"{", b'{"newer": null, ', 1))
    assert read_pipeline(model).unet == before


def test_quantised_weights_are_refused(model):
    file = weights(model, "unet")
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"].astype(np.int8)}, file)
    with pytest.raises(UserError, match=r"'conv_in\.weight' holds int8 numbers"):
        read_pipeline(model)


@pytest.mark.parametrize("part", [*STEMS, "scorer"])
@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_file_and_key(model, part, number):
    file = model / "scorer" / "model.safetensors" if part == "scorer" else weights(model, part)
    key = min(safetensors.numpy.load_file(file))
    edit(file, lambda tensors: np.put(tensors[key], -1, number))
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: '{re.escape(key)}' has numbers that are not finite"):
        if part == "scorer":
            read_clip(model / "scorer", step_aware=None, dtype="bfloat16")
        else:
            read_pipeline(model, "bfloat16")


# ----------------------------------------------------------------------------------------------------- configs of 2022
@pytest.mark.parametrize("version", [None, "0.4.1", "0.8.0.dev0", "0.9.0.dev0", "0.9.0", "0.10.2", "0.42.1"])
@pytest.mark.parametrize("size", [8, 64])
def test_the_size_of_an_old_unet_is_mended_as_diffusers_mends_it(model, capsys, version, size):
    change(model / "unet" / "config.json", sample_size=size, _diffusers_version=version)
    ours, theirs = read_pipeline(model), loaded(model)
    assert ours.latent_shape[:2] == (theirs.unet.config.sample_size,) * 2
    said = f"{model / 'unet' / 'config.json'}: sample_size = 8 of diffusers {version} is taken as 64"
    assert (said in capsys.readouterr().err) == (ours.latent_shape[0] != size)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps_offset": 0},
        {"steps_offset": None},
        {"clip_sample": True},
        {"clip_sample": None, "set_alpha_to_one": None},
        {"steps_offset": 0, "clip_sample": True, "timestep_spacing": "trailing"},
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 0},
    ],
    ids=str,
)
def test_a_scheduler_is_mended_as_diffusers_mends_it(model, capsys, fields):
    change(model / "scheduler" / "scheduler_config.json", **fields)
    ours = read_pipeline(model).scheduler_config
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    theirs = loaded(model, scheduler=scheduler).scheduler.config
    for name, default in (("steps_offset", 0), ("clip_sample", False), ("set_alpha_to_one", True)):
        assert ours.get(name, default) == theirs[name]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("spo_jax: ")]
    mended = [name for name in ("steps_offset", "clip_sample") if name in fields and ours.get(name) != fields[name]]
    assert len(lines) == len(mended)
    for line, name in zip(lines, mended, strict=True):
        assert f"{model / 'scheduler' / 'scheduler_config.json'}: {name} = {fields[name]} is taken as" in line


def test_fields_that_early_configs_lack_have_the_defaults_of_diffusers(model):
    change(model / "vae" / "config.json", scaling_factor=None, layers_per_block=None, _diffusers_version="0.2.2")
    change(model / "unet" / "config.json", act_fn=None, downsample_padding=None, mid_block_scale_factor=None)
    ours, theirs = read_pipeline(model), loaded(model)
    assert ours.vae.scaling_factor == theirs.vae.config.scaling_factor == 0.18215
    assert ours.vae.layers_per_block == theirs.vae.config.layers_per_block


# ------------------------------------------------------------------------------------------------------------ pictures
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    "solver, fields",
    [("ddim", {"set_alpha_to_one": True}), ("ddim", ZERO_SNR), ("dpmpp_2m", ZERO_SNR)],
    ids=["alpha one", "zero snr", "zero snr, dpmpp_2m"],
)
def test_pictures_with_another_scheduler_file_are_those_of_diffusers(model, solver, fields):
    change(model / "scheduler" / "scheduler_config.json", **fields)
    scheduler = {"ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}[solver]
    theirs = pictures.theirs(model, scheduler=scheduler)
    assert np.abs(theirs - pictures.ours(folder=model, solver=solver)).max() <= 2


def test_pictures_of_odd_latents_are_those_of_diffusers():
    size = (36, 44)  # 9 x 11 latents, then 5 x 6
    assert with_image_size(pictures.emoji_pipeline(), *size).latent_shape == (9, 11, 4)
    theirs = pictures.theirs(size=size)
    assert theirs.shape == (2, 36, 44, 3)
    assert np.abs(theirs - pictures.ours(size=size)).max() <= 2


def test_the_shipped_model_draws_in_diffusers_without_a_dtype():
    pipeline = loaded(local("emoji:model"))
    pipeline.set_progress_bar_config(disable=True)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    image = pipeline("a fox on a teal background", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()


# ------------------------------------------------------------------------------------------------ parts from elsewhere
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What diffusers' trainers save of a UNet: ``checkpoint-500`` with a UNet and its average, whose weights differ."""
    folder = tmp_path_factory.mktemp("checkpoint-500")
    unet = UNet2DConditionModel.from_pretrained(small_pipeline() / "unet")
    average = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, use_ema_warmup=True)
    average.step(unet.parameters())
    with torch.no_grad():
        unet.conv_out.bias.fill_(0.25)
    unet.save_pretrained(folder / "unet")
    average.save_pretrained(folder / "unet_ema")
    return folder


@pytest.mark.parametrize("inside, bias", [("", 0.25), ("unet", 0.25), ("unet_ema", 0.0)])
def test_a_unet_as_trainers_save_it_is_put_over_the_pipeline(model, trained, expected, inside, bias):
    weights(model, "unet").unlink()  # the pipeline's own is not read
    pipeline = read_base(Base(str(model), unet=str(trained / inside)))
    np.testing.assert_array_equal(pipeline.params["unet"]["conv_out"]["bias"], np.full(4, bias, np.float32))
    rest = {k: v for k, v in expected["unet"].items() if k != "conv_out"}
    chex.assert_trees_all_equal({k: v for k, v in pipeline.params["unet"].items() if k != "conv_out"}, rest)
    assert pipeline.replaced == {"unet": trained / (inside or "unet")}


def test_a_replacing_part_that_does_not_fit_or_is_no_folder_is_refused(model, tmp_path):
    other = shutil.copytree(model / "unet", tmp_path / "other")
    change(other / "config.json", in_channels=9)
    with pytest.raises(UserError, match=f"{re.escape(str(other))} takes 9 channels.*inpainting"):
        read_pipeline(model, unet=other)
    with pytest.raises(UserError, match=r"is a file; --unet \(config\.unet\) takes a folder"):
        read_pipeline(model, unet=weights(model, "unet"))
    with pytest.raises(UserError, match=r"tokenizer/config\.json does not exist"):
        read_pipeline(model, unet=model / "tokenizer")
    fewer = shutil.copytree(model / "vae", tmp_path / "fewer")
    change(fewer / "config.json", block_out_channels=[16, 32], down_block_types=None, up_block_types=None)
    with pytest.raises(UserError, match="needs 4 at 1/4"):
        read_pipeline(model, vae=fewer)


def test_an_autoencoder_of_another_scale_is_used_and_said(model, tmp_path, capsys):
    other = shutil.copytree(model / "vae", tmp_path / "other")
    change(other / "config.json", scaling_factor=0.5)
    assert read_pipeline(model, vae=other).vae.scaling_factor == 0.5
    assert f"The scaling_factor of autoencoder {other} is 0.5" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- what is written
def test_a_written_pipeline_has_the_parts_it_was_trained_with_and_loads_everywhere(model, trained, tmp_path):
    """Of halved weights in shards, with links as in the hub's cache, and of another UNet and autoencoder."""
    vae = shutil.copytree(model / "vae", tmp_path / "vae")
    edit(weights(tmp_path, "vae"), lambda tensors: tensors["decoder.conv_out.bias"].fill(0.125))
    (vae / "samples.bin").write_bytes(b"of someone's own")
    shutil.copy(weights(model, "text_encoder"), model / "text_encoder" / "model.non_ema.safetensors")
    only_fp16(model)
    halved = loaded(model, variant="fp16").text_encoder.half()
    weights(model, "text_encoder", "fp16").unlink()
    halved.save_pretrained(model / "text_encoder", variant="fp16", max_shard_size="1MB")
    (model / "text_encoder" / "model.non_ema.safetensors").unlink()
    tokens = model / "tokenizer" / "vocab.json"
    tokens.rename(tmp_path / "blob").chmod(0o400)
    tokens.symlink_to(tmp_path / "blob")

    pipeline = read_base(Base(str(model), unet=str(trained), vae=str(vae)))
    out = tmp_path / "out"
    write_pipeline(out, pipeline.folder, pipeline.params["unet"], replaced=pipeline.replaced, variant=pipeline.variant)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert not [name for name in names if "fp16" in name or "samples" in name]
    assert {f"{part}/{STEMS[part]}.safetensors" for part in ("unet", "vae")} <= names
    assert "text_encoder/model.safetensors.index.json" in names
    (tmp_path / "usual").write_bytes(b"")
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    for path in out.rglob("*"):
        assert not path.is_symlink() and (path.is_dir() or stat.S_IMODE(path.stat().st_mode) == usual), path
    again = read_pipeline(out)
    chex.assert_trees_all_equal(again.params, pipeline.params)
    np.testing.assert_array_equal(again.params["vae"]["decoder"]["conv_out"]["bias"], np.full(3, 0.125, np.float32))
    assert np.abs(pictures.theirs(out) - pictures.ours(folder=out)).max() <= 2


# ---------------------------------------------------------------------------------------------------- what is recorded
def record(folder, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model": "m", "variant": "", "vae": ""} | config), encoding="utf-8")
    return str(folder)


NOTHING = dict.fromkeys(["model", "variant", "unet", "vae"])


def test_a_workdir_names_its_base_model_and_flags_come_first(tmp_path):
    old = record(tmp_path / "old", model="org/m@main", variant="fp16", vae="v")  # without the key unet
    new = record(tmp_path / "new", unet="u")
    assert base_of([old], **NOTHING) == Base("org/m@main", "fp16", "", "v")
    assert base_of(["x.safetensors", f"{new}:0.5"], **NOTHING) == Base("m", unet="u")
    assert base_of([old], **NOTHING | {"vae": "", "unet": "w"}) == Base("org/m@main", "fp16", "w", "")
    assert base_of([old], **NOTHING | {"model": "other"}) == Base("other")
    assert base_of([], **NOTHING, default="emoji:model") == Base("emoji:model")
    assert base_of_config({"model": "m", "variant": "", "vae": ""}) == Base("m")
    with pytest.raises(UserError, match=r"--model is missing, and .*old.*new.* name different ones"):
        base_of([old, new], **NOTHING)
    with pytest.raises(UserError, match=r"--model is missing, and x\.safetensors is no --workdir"):
        base_of(["x.safetensors"], **NOTHING)
    nameless = record(tmp_path / "nameless", model=None)
    with pytest.raises(UserError, match=r"nameless/config\.json names no model"):
        base_of([nameless], **NOTHING)
