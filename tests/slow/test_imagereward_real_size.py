"""ImageReward of the published size, with random weights, against PyTorch; minutes, 10 GB of memory, 2 GB of disk."""

import itertools
import json

import flax.traverse_util
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from spo_jax.evaluation.imagereward import open_imagereward
from spo_jax.evaluation.preprocess import TORCHVISION, normalised, pil_crop
from spo_jax.formats import imagereward as files
from spo_jax.formats import names
from spo_jax.formats.networks import network_shapes
from spo_jax.models import ImageReward
from spo_jax.models.blip import REWARD_MEAN, REWARD_STD

# The published ``med_config.json``; its encoder_width is not that of the vision tower.
CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
WIDTH = 1024
# Bytes of the published file, which leave about 340 for the names of each of its 625 tensors.
PUBLISHED_BYTES = 1_786_880_927


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.attn.qkv, self.attn.proj = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.mlp.fc1, self.mlp.fc2 = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.attn.qkv(self.norm1(x)).reshape(batch, length, 3, 16, 64)
        query, key, value = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        weights = (query @ key.transpose(-1, -2) / 8).softmax(-1)
        x = x + self.attn.proj((weights @ value).transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class TorchVision(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 197, WIDTH))
        self.patch_embed = torch.nn.Module()
        self.patch_embed.proj = torch.nn.Conv2d(3, WIDTH, 16, 16)
        self.blocks = torch.nn.ModuleList(TorchBlock() for _ in range(24))
        self.norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TorchReward(torch.nn.Module):
    """Of transformers' BERT, whose attention to pictures gets their width, and which adds no token types."""

    def __init__(self):
        super().__init__()
        self.blip, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.blip.visual_encoder = TorchVision()
        config = BertConfig(**CONFIG, is_decoder=True, attn_implementation="eager")
        self.blip.text_encoder = bert = BertModel(config, add_pooling_layer=False)
        bert.config.is_decoder = False  # its layers have the attention to pictures now; the mask is not to be causal
        for layer in bert.encoder.layer:
            for name in ("key", "value"):
                setattr(layer.crossattention.self, name, torch.nn.Linear(WIDTH, 768))
        self.blip.vision_proj, self.blip.text_proj = torch.nn.Linear(WIDTH, 256), torch.nn.Linear(768, 256)
        pairs = zip((0, 2, 4, 6, 7), itertools.pairwise((768, 1024, 128, 64, 16, 1)), strict=True)
        linear = {str(i): torch.nn.Linear(*widths) for i, widths in pairs}
        self.mlp.layers = torch.nn.ModuleDict(linear)

    def forward(self, pixels, tokens, mask):
        picture = self.blip.visual_encoder(pixels)
        x = self.blip.text_encoder(tokens, mask, encoder_hidden_states=picture).last_hidden_state[:, 0]
        for layer in self.mlp.layers.values():
            x = layer(x)
        return (x[:, 0] - REWARD_MEAN) / REWARD_STD


@pytest.fixture(scope="module")
def reference():
    """With random weights, such that signals keep their size and pictures and prompts count."""
    torch.manual_seed(0)
    model = TorchReward().eval().requires_grad_(False)
    for name, value in model.named_parameters():
        spread = value[0].numel() ** -0.5 if value.ndim in (2, 4) else 0.1
        value.normal_(0, 1 if "embeddings" in name and value.ndim == 2 else spread)
        if "norm" in name.lower() and name.endswith("weight"):
            value.add_(1)
        if "token_type" in name:
            value.zero_()
    return model


def published_state(model):
    return {key: value for key, value in model.state_dict().items() if "token_type" not in key}


@pytest.mark.slow
def test_names_shapes_and_bytes_are_the_published_ones(reference):
    network = ImageReward.from_config(CONFIG)
    flat = flax.traverse_util.flatten_dict(network_shapes(network))
    ours = {names.torch_key(path): names.torch_shape(path, leaf.shape) for path, leaf in flat.items()}
    state = published_state(reference)
    unused = {key for key in state if key not in ours}
    assert unused == {f"blip.{part}_proj.{leaf}" for part in ("vision", "text") for leaf in ("weight", "bias")}
    assert ours == {key: tuple(value.shape) for key, value in state.items() if key not in unused}
    assert sum(np.prod(shape) for shape in ours.values()) == 446_206_689
    numbers = sum(value.nbytes for value in state.values()) + 512 * 8  # position_ids
    assert 300 < (PUBLISHED_BYTES - numbers) / (len(state) + 1) < 400


@pytest.mark.slow
def test_rewards_of_real_size(tmp_path, reference):
    state = published_state(reference)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, tmp_path / files.WEIGHTS)
    (tmp_path / files.CONFIG).write_text(json.dumps(CONFIG), encoding="utf-8")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", *(f"##{c}" for c in "abcdefghij")]
    words += [f"[unused{i}]" for i in range(30522 - len(words))]
    (tmp_path / files.VOCABULARY).write_text("\n".join(words) + "\n", encoding="utf-8")

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in ((224, 300, 3), (512, 256, 3), (300, 300, 3))]
    prompts = ["abc de", "", "a " * 60]
    found = open_imagereward(str(tmp_path), batch_size=2).score(pictures, prompts)

    tokenizer = files.read_wordpiece(tmp_path / files.VOCABULARY, 30524)
    tokens, mask = files.tokenize_wordpiece(tokenizer, prompts)
    pixels = np.stack([normalised(pil_crop(picture, 224, TORCHVISION)) for picture in pictures]).transpose(0, 3, 1, 2)
    expected = reference(*map(torch.from_numpy, (pixels, tokens.astype(np.int64), mask))).numpy()
    print("rewards", expected, "largest difference", np.abs(found - expected).max())
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
