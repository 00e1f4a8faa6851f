"""HPSv2's network at its real size, with random weights, against PyTorch; 10 GB of memory and 3 GB of disk."""

import gc

import numpy as np
import pytest
import torch
import transformers

from spo_jax.evaluation.clip_metrics import MetricOptions, make_towers
from spo_jax.formats.open_clip import read_open_clip
from spo_jax.models.published import CLIP_VIT_H
from tests.formats.test_open_clip import expected_vit_h

pytestmark = pytest.mark.slow
LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
LAYER |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
OUTSIDE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
}
NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}


def as_open_clip(state, key):
    """A parameter of open_clip, of those of transformers' model."""
    if key in ("text_projection", "visual.proj"):
        return state["text_projection.weight" if key == "text_projection" else "visual_projection.weight"].T
    if key in OUTSIDE:
        return state[OUTSIDE[key]]
    module, _, leaf = key.rpartition(".")
    if module in NORMS:
        return state[f"{NORMS[module]}.{leaf}"]
    tower, _, rest = key.partition("transformer.resblocks.")
    number, _, inside = rest.partition(".")
    layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}"
    if inside.startswith("attn.in_proj_"):
        leaf = inside.removeprefix("attn.in_proj_")
        return torch.cat([state[f"{layer}.self_attn.{name}_proj.{leaf}"] for name in "qkv"])
    part, _, leaf = inside.rpartition(".")
    return state[f"{layer}.{LAYER[part]}.{leaf}"]


def test_real_vit_h_in_open_clips_keys_computes_what_pytorch_does(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.standard_normal((2, 224, 224, 3), dtype=np.float32)
    ids = np.zeros((2, 77), np.int32)
    for row, length in zip(ids, (9, 77), strict=True):
        row[:length] = [49406, *generator.integers(0, 49406, length - 2), 49407]
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(**CLIP_VIT_H)).eval()
    for parameter in model.parameters():  # numbers that the file, which is of half precision, holds exactly
        parameter.data = parameter.data.half().float()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("position_ids")}
    shapes = expected_vit_h()
    torch.save(
        {
            "state_dict": {key: as_open_clip(state, key).half().contiguous() for key in shapes},
            "iterations": 4000,
            "name": "random",
        },
        tmp_path / "HPS_v2.1_compressed.pt",
    )
    assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == sum(value.numel() for value in state.values())
    with torch.no_grad():
        image = model.get_image_features(pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
        text = model.get_text_features(input_ids=torch.from_numpy(ids).long())
    expected = [
        torch.nn.functional.normalize(getattr(out, "pooler_output", out), dim=-1).numpy() for out in (image, text)
    ]
    del model, state
    gc.collect()
    clip, params = read_open_clip(tmp_path / "HPS_v2.1_compressed.pt")
    towers = make_towers(clip, params, MetricOptions(batch_size=2))
    for embed, rows, theirs in zip((towers.images, towers.texts), (pixels, ids), expected, strict=True):
        ours = embed(rows)
        print(f"largest deviation {np.abs(ours - theirs).max():.1e} of {np.abs(theirs).max():.2f}")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
