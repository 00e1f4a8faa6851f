"""Models and texts of open_clip, which HPSv2 is made with: its weight files, and its ids of captions.

A file has the whole CLIP in open_clip's names: flat, or below ``state_dict`` as training programs write it. Its sizes
are not in it. They are those of ViT-H-14, unless an ``open_clip_config.json`` lies beside the file.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int, PyTree

from spo_jax.errors import UserError
from spo_jax.formats import names
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.networks import build
from spo_jax.formats.original_layout import OPEN_CLIP_LAYER, Original, open_clip_key
from spo_jax.formats.stored import StoredArray
from spo_jax.formats.tokenizers import ClipTokenizer
from spo_jax.formats.torch_bin import index_training_checkpoint
from spo_jax.formats.weights import Placement, Weights, is_torch_file, open_file, read_params
from spo_jax.models.clip import CLIPModel
from spo_jax.models.published import CLIP_VIT_H

CONFIG = "open_clip_config.json"
_VISION = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "logit_scale": "logit_scale",
}
_BUFFERS = ("attn_mask",)  # without information
_START, _END = "<start_of_text>", "<end_of_text>"


# ----------------------------------------------------------------------------------------------------------- weights
def read_open_clip(
    path: Path, dtype: DTypeLike = jnp.float32, *, sharding: Placement = None
) -> tuple[CLIPModel, PyTree]:
    """A CLIP from a weight file of open_clip, and its parameters, both in ``dtype``; exact GELU, as ViT-H-14 has it.

    Raises:
      UserError: the file is missing or damaged, its keys or shapes are not those of the model, or a config beside it
        describes one that is not supported.
    """
    file = path.parent / CONFIG
    config = transformers_config(read_json(file), file) if file.is_file() else CLIP_VIT_H
    where = f"File {file}" if file.is_file() else "ViT-H-14"
    clip, shapes = build(CLIPModel, config, dtype, where=where, step_aware=False)
    arrays = index_training_checkpoint(path)[0] if is_torch_file(path) else open_file(path).arrays
    found = _find(path, arrays, shapes, file if file.is_file() else None)
    return clip, read_params(Weights(path, found), shapes, sharding=sharding)


def originals(shapes: PyTree) -> dict[tuple[str, ...], Original]:
    """Where each parameter of a ``CLIPModel`` lies in a file of open_clip, by its path in ``shapes``.

    Queries, keys and values are one parameter there, one below the other; both projections are transposed.
    """
    return {path: _original(names.torch_key(path)) for path in flax.traverse_util.flatten_dict(shapes)}


def _original(key: str) -> Original:
    module, _, leaf = key.rpartition(".")
    third = re.search(r"\.self_attn\.([qkv])_proj\.", key)
    number = "qkv".index(third[1]) if third else None
    if key in _VISION:
        return Original(_VISION[key], transposed=key == "visual_projection.weight")
    if module in _VISION:
        return Original(f"{_VISION[module]}.{leaf}")
    layer = re.fullmatch(r"vision_model\.encoder\.layers\.(\d+)\.(.+)", module)
    if layer is None:
        return Original(open_clip_key(key), third=number, transposed=module == "text_projection")
    theirs = OPEN_CLIP_LAYER[layer[2]]
    joint = "_" if theirs.endswith("in_proj") else "."
    return Original(f"visual.transformer.resblocks.{layer[1]}.{theirs}{joint}{leaf}", third=number)


def _find(path: Path, arrays: Mapping[str, StoredArray], shapes: PyTree, config: Path | None) -> dict[str, StoredArray]:
    """The arrays of a file by their keys in transformers, if it has the keys and shapes of the model and no others."""
    model = f"the model in {config}" if config else f"a ViT-H-14 (for another model, put its {CONFIG} beside it)"
    found, used = {}, set()
    flat = flax.traverse_util.flatten_dict(shapes)
    for tree_path, original in originals(shapes).items():
        ours = names.torch_shape(tree_path, flat[tree_path].shape)
        if original.key not in arrays:
            listed = ", ".join(sorted(arrays)[:3]) or "none"
            raise UserError(
                f"Weight file {path} has no key {original.key!r} (its keys: {listed}, ...); give a file of open_clip "
                f"with {model}."
            )
        stored = arrays[original.key]
        if stored.shape != original.shape(ours):
            raise UserError(
                f"Weight file {path}: {original.key!r} has shape {stored.shape}, and not {original.shape(ours)} as "
                f"{model}; get the file that belongs to it."
            )
        used.add(original.key)
        found[names.torch_key(tree_path)] = original.view(stored, ours)
    left = sorted(key for key in arrays if key not in used and key not in _BUFFERS)
    if left:
        raise UserError(
            f"Weight file {path} has {len(left)} keys that are not of {model}: {', '.join(left[:3])}; it is refused, "
            "because leaving them out could change the model."
        )
    return found


def transformers_config(config: Json, file: Path) -> dict[str, Any]:
    """The fields of transformers for an ``open_clip_config.json``; UserError if one is missing or not supported."""
    try:
        model = config["model_cfg"]
        vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
        quick = bool(model.get("quick_gelu", False))
        if extra := sorted({*model} - {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}):
            raise UserError(f"File {file}: model_cfg.{extra[0]} is not supported; use a plain CLIP.")
        ours: dict[str, Any] = {"projection_dim": model["embed_dim"]}
        towers = {
            "vision_config": (vision, {"image_size": "image_size", "patch_size": "patch_size"}),
            "text_config": (text, {"context_length": "max_position_embeddings", "vocab_size": "vocab_size"}),
        }
        for name, (given, renamed) in towers.items():
            width, layers = given.pop("width"), given.pop("layers")
            heads = width // given.pop("head_width", 64) if name == "vision_config" else given.pop("heads")
            ratio = given.pop("mlp_ratio", 4.0)
            ours[name] = {
                "hidden_size": width,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "intermediate_size": int(width * ratio),
                "hidden_act": "quick_gelu" if quick else "gelu",
            } | {theirs: given.pop(key) for key, theirs in renamed.items()}
            if given:
                raise UserError(f"File {file}: {name[:-7]}_cfg.{sorted(given)[0]} is not supported; use a plain CLIP.")
        ours["text_config"]["eos_token_id"] = 2  # pools at the largest id, as open_clip does
        return ours
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"File {file} describes no CLIP of open_clip ({error!r}); copy it again.") from error


# -------------------------------------------------------------------------------------------------------------- texts
def cleaned(text: str) -> str:
    """A caption as open_clip cleans it: mojibake and ligatures mended, html unescaped twice, single spaces, lower."""
    import ftfy  # only this needs it

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def open_clip_ids(tokenizer: ClipTokenizer, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
    """The ids that open_clip gives to captions, int32 [n, model_max_length], padded with 0.

    ``tokenizer`` is transformers' with the same vocabulary. The two take different words in a caption for special
    tokens: open_clip ``<start_of_text>`` and ``<end_of_text>``, which transformers calls ``<|startoftext|>`` and
    ``<|endoftext|>``.
    """
    length, start, end = tokenizer.model_max_length, tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in zip(ids, texts, strict=True):
        inner: list[int] = []
        for piece in _pieces(cleaned(text)):
            if piece in (_START, _END):
                inner.append(start if piece == _START else end)
            elif piece:
                inner += tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        whole = [start, *inner[: length - 2], end]
        row[: len(whole)] = whole
    return ids


def _pieces(text: str) -> Iterator[str]:
    """A text cut at the special tokens that open_clip finds in it: where a word begins, not inside of punctuation."""
    done = 0
    for match in re.finditer(f"{_START}|{_END}", text):
        before = text[match.start() - 1 : match.start()]
        if match.start() == done or before.isspace() or unicodedata.category(before)[0] in "LN":
            yield text[done : match.start()]
            yield match[0]
            done = match.end()
    yield text[done:]
