"""Configs of networks as diffusers and transformers have them: what is not supported is refused by its name."""

import pytest

from spo_jax.errors import UserError
from spo_jax.models import AutoencoderKL, CLIPModel, UNet2DConditionModel


@pytest.mark.parametrize(
    "build, field",
    [
        (lambda: UNet2DConditionModel.from_config({"wings": 2}), "wings"),
        (lambda: UNet2DConditionModel.from_config({"class_embed_type": "timestep"}), "class_embed_type"),
        (lambda: UNet2DConditionModel.from_config({"down_block_types": ["AttnDownBlock2D"] * 4}), "AttnDownBlock2D"),
        (lambda: UNet2DConditionModel.from_config({"layers_per_block": [1, 2]}), "layers_per_block"),
        (lambda: AutoencoderKL.from_config({"latents_mean": [0.0]}), "latents_mean"),
        (lambda: AutoencoderKL.from_config({"down_block_types": ["X"] * 4}), "down_block_types"),
        (lambda: CLIPModel.from_config({"text_config": {"hidden_act": "relu"}}, step_aware=False), "hidden_act"),
    ],
)
def test_unsupported_config_fields_are_refused_by_name(build, field):
    with pytest.raises(UserError, match=field):
        build()
