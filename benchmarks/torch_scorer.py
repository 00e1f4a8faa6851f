"""The step-aware CLIP in PyTorch."""

from __future__ import annotations

import math
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch.nn import functional
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

TIME_EMBEDDING_DIM = 256


def read_scorer(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The step-aware CLIP of a folder: that of transformers, with time layers put into its vision tower.

    Every weight of the file has its place in it, and the other way round.
    """
    transformers.logging.set_verbosity_error()  # it would list the time layers, which it does not know
    clip = transformers.CLIPModel.from_pretrained(folder, dtype=dtype)
    width = clip.config.vision_config.hidden_size

    def modulation(count: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(width, count * width))

    layers = torch.nn.Linear(TIME_EMBEDDING_DIM, width), torch.nn.SiLU(), torch.nn.Linear(width, width)
    clip.t_embedder = torch.nn.ModuleDict({"mlp": torch.nn.Sequential(*layers)})
    clip.vision_model.adaLN_modulation = modulation(2)
    for layer in clip.vision_model.encoder.layers:
        layer.adaLN_modulation = modulation(6)
    clip.to(dtype).load_state_dict(safetensors.torch.load_file(next(folder.glob("*.safetensors"))))
    return clip.requires_grad_(False).eval()


def image_features(clip: torch.nn.Module, images: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Unit features float32 [n, e] of images [n, 3, H, W] in [-1, 1] at timesteps [n]."""
    tower, size = clip.vision_model, clip.config.vision_config.image_size
    pixels = images.float()
    if pixels.shape[-2:] != (size, size):
        pixels = functional.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    pixels = ((pixels / 2 + 0.5).clamp(0, 1) - mean) / std
    half = TIME_EMBEDDING_DIM // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=pixels.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).to(clip.dtype)
    time = clip.t_embedder["mlp"](sinusoids)

    x = tower.pre_layrnorm(tower.embeddings(pixels.to(clip.dtype)))
    for layer in tower.encoder.layers:
        shift1, scale1, gate1, shift2, scale2, gate2 = layer.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
        x = x + gate1 * layer.self_attn(layer.layer_norm1(x) * (1 + scale1) + shift1, attention_mask=None)[0]
        x = x + gate2 * layer.mlp(layer.layer_norm2(x) * (1 + scale2) + shift2)
    shift, scale = tower.adaLN_modulation(time).chunk(2, dim=-1)
    pooled = tower.post_layernorm(x[:, 0]) * (1 + scale) + shift
    return functional.normalize(clip.visual_projection(pooled).float(), dim=-1)


def text_features(clip: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Unit features float32 [n, e] of tokens [n, L]."""
    return functional.normalize(clip.get_text_features(input_ids=tokens).pooler_output.float(), dim=-1)
