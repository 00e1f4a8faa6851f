"""Models of the published sizes, without their memory: every key and shape is that of the PyTorch module."""

import math

import diffusers
import flax.traverse_util
import jax.numpy as jnp
import pytest
import torch
import transformers

from spo_jax.diffusion.schedule import make_schedule
from spo_jax.formats.names import torch_key, torch_shape
from spo_jax.formats.networks import network_shapes
from spo_jax.models import (
    AutoencoderKL,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
    published,
)

UNET = (UNet2DConditionModel.from_config, diffusers.UNet2DConditionModel.from_config)
VAE = (AutoencoderKL.from_config, diffusers.AutoencoderKL.from_config)


def text(ours, theirs):
    def build(config):
        return theirs(transformers.CLIPTextConfig(**config))

    return ours.from_config, build


TEXT = text(CLIPTextModel, transformers.CLIPTextModel)
TEXT_WITH_PROJECTION = text(CLIPTextModelWithProjection, transformers.CLIPTextModelWithProjection)
CLIP = (
    lambda config: CLIPModel.from_config(config, step_aware=False),
    lambda config: transformers.CLIPModel(transformers.CLIPConfig(**config)),
)


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in flax.traverse_util.flatten_dict(shapes).values())


@pytest.mark.parametrize(
    "model, config, parameters",
    [
        pytest.param(UNET, published.UNET_SD15, 859_520_964, id="UNet SD1.5"),
        pytest.param(UNET, published.UNET_SD21, 865_910_724, id="UNet SD2.1"),
        pytest.param(UNET, published.UNET_SDXL, 2_567_463_684, id="UNet SDXL"),
        pytest.param(VAE, published.VAE_SD, 83_653_863, id="VAE SD"),
        pytest.param(VAE, published.VAE_SDXL_FP16_FIX, 83_653_863, id="sdxl-vae-fp16-fix"),
        pytest.param(TEXT, published.TEXT_VIT_L, 123_060_480, id="CLIP ViT-L text"),
        pytest.param(TEXT, published.TEXT_SD21, 340_387_840, id="OpenCLIP ViT-H text"),
        pytest.param(TEXT_WITH_PROJECTION, published.TEXT_BIG_G, 694_659_840, id="OpenCLIP bigG text"),
        pytest.param(CLIP, published.CLIP_VIT_H, 986_109_441, id="CLIP ViT-H"),
    ],
)
def test_every_key_and_shape_is_that_of_the_pytorch_module(model, config, parameters):
    build, build_theirs = model
    shapes = network_shapes(build(config))
    ours = {torch_key(p): torch_shape(p, s.shape) for p, s in flax.traverse_util.flatten_dict(shapes).items()}
    with torch.device("meta"):
        theirs = {key: tuple(value.shape) for key, value in build_theirs(config).state_dict().items()}
    if model is TEXT and not any(key.startswith("text_model.") for key in theirs):
        # transformers 5 has dropped this prefix, which all published files have.
        theirs = {f"text_model.{key}": shape for key, shape in theirs.items()}
    assert ours == theirs
    assert count(shapes) == parameters


def test_step_aware_clip_has_its_time_layers_and_nothing_else_beside():
    plain, step_aware = (
        flax.traverse_util.flatten_dict(network_shapes(CLIPModel.from_config(published.CLIP_VIT_H, step_aware=s)))
        for s in (False, True)
    )
    new = {torch_key(path): leaf.shape for path, leaf in step_aware.items() if path not in plain}
    layers = [f"vision_model.encoder.layers.{i}.adaLN_modulation.1" for i in range(32)]
    modules = ["t_embedder.mlp.0", "t_embedder.mlp.2", "vision_model.adaLN_modulation.1", *layers]
    assert sorted(new) == sorted(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))
    assert sum(math.prod(shape) for shape in new.values()) == 320_066_560


@pytest.mark.parametrize(
    "config, prediction_type",
    [
        (published.SCHEDULER_SD15, "epsilon"),
        (published.SCHEDULER_SD21, "v_prediction"),
        (published.SCHEDULER_SDXL, "epsilon"),
    ],
)
def test_published_schedules_are_understood(config, prediction_type):
    schedule = make_schedule(config, 20)
    assert schedule.prediction_type == prediction_type
    assert schedule.timesteps.tolist() == list(range(951, 0, -50))
    assert jnp.isfinite(schedule.alphas_cumprod).all()
