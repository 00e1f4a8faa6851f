"""Flax Linen models of a latent diffusion pipeline, named and configured as in diffusers and transformers."""

from spo_jax.models.blip import ImageReward
from spo_jax.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTextOutput
from spo_jax.models.unet import UNet2DConditionModel
from spo_jax.models.vae import AutoencoderKL

__all__ = [
    "AutoencoderKL",
    "CLIPModel",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTextOutput",
    "ImageReward",
    "UNet2DConditionModel",
]
