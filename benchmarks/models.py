"""Random models of several sizes in the layout of diffusers and transformers.

Both programs of ``benchmarks.against_pytorch`` read the same folder, which is written once:

    model_index.json  scheduler/  tokenizer/  text_encoder/  unet/  vae/  scorer/  prompts.txt

Numbers of random networks mean nothing, but they cost what those of trained ones cost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Work
from spo_jax.errors import UserError
from spo_jax.files import cache_folder
from spo_jax.formats.hub import local
from spo_jax.formats.networks import PARTS, build
from spo_jax.formats.safetensors_io import write_params
from spo_jax.models import CLIPModel
from spo_jax.models.clip import is_time_layer
from spo_jax.models.published import CLIP_VIT_H, PIPELINES
from spo_jax.spo.config import get_config

Json = dict[str, Any]

VOCABULARY = 1101  # of the emoji models, whose tokenizer serves all sizes
END_OF_TEXT = VOCABULARY - 1
PROMPTS = ("a fox on a teal background", "a red heart", "a cat in the snow", "two green apples")
SD15 = PIPELINES["stable-diffusion-v1-5/stable-diffusion-v1-5"]


class Size(NamedTuple):
    """Models, and what an iteration does with them.

    Attributes:
      networks: the ``config.json`` of "unet", "vae", "text_encoder" and "scorer".
      work: B (N - d) is a multiple of its minibatch, so that all updates are of one size.
      stored: dtype of the weight files.
    """

    networks: dict[str, Json]
    work: Work
    stored: str = "float32"


def _work(pixels: int, prompts: int, candidates: int, steps: int, plain_steps: int, minibatch: int) -> Work:
    """With the recipe of the paper for SD1.5."""
    c = get_config()
    return Work(
        texts=list(PROMPTS[:prompts]),
        pixels=pixels,
        candidates=candidates,
        steps=steps,
        plain_steps=plain_steps,
        minibatch=minibatch,
        rank=c.lora.rank,
        guidance=c.sampling.guidance_scale,
        beta=c.loss.beta,
        clip_range=c.loss.clip_range,
        learning_rate=c.train.learning_rate,
        betas=(c.train.adam_b1, c.train.adam_b2),
        eps=c.train.adam_eps,
        weight_decay=c.train.weight_decay,
    )


def _unet(widths: tuple[int, ...], layers: int, heads: int, context: int, groups: int, latents: int) -> Json:
    """As SD1.5 is built: attention everywhere but in the innermost level."""
    outer = len(widths) - 1
    down = [*("CrossAttnDownBlock2D",) * outer, "DownBlock2D"]
    up = ["UpBlock2D", *("CrossAttnUpBlock2D",) * outer]
    changes = {"block_out_channels": list(widths), "layers_per_block": layers, "attention_head_dim": heads}
    changes |= {"cross_attention_dim": context, "norm_num_groups": groups, "sample_size": latents}
    # Of old diffusers versions ``sample_size`` is mended, see ``mended_unet``.
    return (
        {k: v for k, v in SD15["unet"].items() if k != "_diffusers_version"}
        | changes
        | {"down_block_types": down, "up_block_types": up}
    )


def _vae(widths: tuple[int, ...], layers: int, groups: int, pixels: int) -> Json:
    changes = {"block_out_channels": list(widths), "layers_per_block": layers, "norm_num_groups": groups}
    blocks = {f"{way}_block_types": [f"{way.title()}{kind}Block2D"] * len(widths) for way, kind in _HALVES}
    return SD15["vae"] | changes | blocks | {"sample_size": pixels}


_HALVES = (("down", "Encoder"), ("up", "Decoder"))


def _text(width: int, layers: int, heads: int, length: int) -> Json:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "max_position_embeddings": length, "projection_dim": width}
    return SD15["text_encoder"] | sizes | {"vocab_size": VOCABULARY} | _IDS


_IDS = {"bos_token_id": VOCABULARY - 2, "eos_token_id": END_OF_TEXT, "pad_token_id": END_OF_TEXT}


def _clip(text: Json, width: int, layers: int, heads: int, image: int, patch: int) -> Json:
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    vision |= {"num_attention_heads": heads, "image_size": image, "patch_size": patch, "projection_dim": width}
    vision |= {"model_type": "clip_vision_model", "hidden_act": "gelu"}
    towers = {"text_config": text | {"model_type": "clip_text_model"}, "vision_config": vision}
    return {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width} | towers


_SD15_NETWORKS = {
    "unet": SD15["unet"],
    "vae": SD15["vae"],
    "text_encoder": SD15["text_encoder"] | _IDS,
    "scorer": CLIP_VIT_H | {"text_config": CLIP_VIT_H["text_config"] | _IDS},
}
SIZES = {
    "tiny": Size(
        {
            "unet": _unet((32, 64), 1, 4, 64, 8, 16),
            "vae": _vae((16, 32), 1, 8, 32),
            "text_encoder": _text(64, 2, 4, 16),
            "scorer": _clip(_text(64, 2, 4, 16), 64, 2, 4, 24, 6),
        },
        _work(32, prompts=2, candidates=2, steps=4, plain_steps=1, minibatch=3),
    ),
    "small": Size(
        {
            "unet": _unet((64, 128, 256, 256), 2, 8, 256, 32, 32),
            "vae": _vae((32, 64, 128, 128), 2, 32, 256),
            "text_encoder": _text(256, 6, 4, 77),
            "scorer": _clip(_text(256, 6, 4, 77), 256, 12, 4, 224, 14),
        },
        _work(256, prompts=2, candidates=4, steps=8, plain_steps=2, minibatch=4),
    ),
    # A pair at a time, so that both programs fit a host of 24 GiB in float32.
    "sd15": Size(
        _SD15_NETWORKS, _work(256, prompts=1, candidates=2, steps=4, plain_steps=1, minibatch=1), stored="bfloat16"
    ),
}


# ------------------------------------------------------------------------------------------------------------ folders
def model_folder(name: str, folder: str = "") -> Path:
    """The folder of the models of a size; writes it if it is not there. UserError if there is no place for it.

    Args:
      name: in ``SIZES``.
      folder: where folders of models are kept; empty: the user's cache. One of another configuration has another name.
    """
    size = SIZES[name]
    cache = cache_folder()
    if not folder and cache is None:
        raise UserError("There is no home to keep random models in; name a folder with --folder.")
    digest = hashlib.sha256(
        json.dumps([size.networks, size.stored, size.work.texts], sort_keys=True).encode()
    ).hexdigest()[:8]
    place = (Path(folder) if folder else cache / "benchmarks") / f"{name}-{digest}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=place.parent))
        try:
            _write_models(size, temporary)
            os.replace(temporary, place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return place


def _write_models(size: Size, folder: Path) -> None:
    emoji = local("emoji:model")
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(emoji / part, folder / part)
    shutil.copy(emoji / "model_index.json", folder)
    (folder / "prompts.txt").write_text("\n".join(size.work.texts) + "\n", encoding="utf-8")
    file = folder / "tokenizer" / "tokenizer_config.json"
    length = {"model_max_length": size.networks["text_encoder"]["max_position_embeddings"]}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | length), encoding="utf-8")
    dtype = jnp.dtype(size.stored)
    for seed, (part, config) in enumerate(size.networks.items()):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        stem = PARTS[part].stem if part in PARTS else PARTS["text_encoder"].stem
        shapes = part_shapes(part, config)
        write_params(folder / part / f"{stem}.safetensors", _drawn(shapes, seed, dtype), dtype=dtype)


def part_shapes(part: str, config: Json) -> Json:
    """Shapes of the parameters of a part, as a tree."""
    if part == "scorer":
        return build(CLIPModel, config, jnp.float32, where=part, step_aware=True)[1]
    return build(PARTS[part].model, config, jnp.float32, where=part)[1]


def _drawn(shapes: Json, seed: int, dtype: np.dtype) -> Json:
    """Random parameters under which activations keep their scale from layer to layer."""
    flat = flax.traverse_util.flatten_dict(shapes)
    keys = iter(np.random.SeedSequence(seed).spawn(len(flat)))
    drawn = {}
    for path, leaf in flat.items():
        values = np.random.Generator(np.random.SFC64(next(keys))).standard_normal(leaf.shape, np.float32)
        match path[-1]:
            case "kernel":
                # Time layers are gates: as wide as the others they would make the deep tower blow up.
                values *= (0.1 if is_time_layer(path) else 1.0) / math.sqrt(math.prod(leaf.shape[:-1]))
            case "scale":
                values = 1 + 0.1 * values
            case "logit_scale":
                values = np.full(leaf.shape, math.log(100.0), np.float32)
            case _:
                values *= 0.1
        if path[-1] == "bias" and path[-2] == "adaLN_modulation_1" and "encoder" in path:
            values.reshape(6, -1)[[2, 5]] += 1  # the gates of attention and of the feed-forward layer
        drawn[path] = values.astype(dtype)
    return flax.traverse_util.unflatten_dict(drawn)


def num_parameters(size: Size) -> dict[str, int]:
    """Of each part."""
    return {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part_shapes(part, config)))
        for part, config in size.networks.items()
    }
