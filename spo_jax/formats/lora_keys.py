"""How LoRA files name the layers that they adapt, and what else than plain LoRA their keys tell.

A layer is known by its part, ``"unet"``, ``"text_encoder"`` or ``"text_encoder_2"``, and the path that it has in the
part's tree, ``("down_blocks_0", "attentions_0", ..., "attn1", "to_out_0")``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import flax.traverse_util
from jaxtyping import PyTree

from spo_jax.formats import names
from spo_jax.formats.original_names import unet_name

UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")
PARTS = (UNET, *TEXT_ENCODERS)
# What stands before the name of a layer: a name with dots follows ("unet.down_blocks.0..."), or with underscores.
# OneTrainer's internal names have the kohya trainer's prefixes and dots; ComfyUI's own are the last ones.
_DOTTED = {
    "unet": ("unet.", "lora_unet.", "diffusion_model."),
    "text_encoder": (
        *("text_encoder.", "lora_te.", "lora_te1.", "clip_l."),
        *("text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
    ),
    "text_encoder_2": ("text_encoder_2.", "lora_te2.", "clip_g.", "text_encoders.clip_g.transformer."),
}
_KOHYA = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}

# "<layer>.lora_A.weight", ".lora_down.weight", ".lora.down.weight", "<block>.processor.to_q_lora.down.weight" and
# ".lora_linear_layer.down.weight"; peft may put the adapter's name before ".weight".
_MATRIX = re.compile(r"(.+?)(?:\.lora|\.lora_linear_layer|_lora)[._](A|B|down|up)(?:\.[\w-]+)?\.weight")
_ROLES = {"A": "down", "down": "down", "B": "up", "up": "up"}
_OTHER = {"A": "B", "B": "A", "down": "up", "up": "down"}
# Kinds of adapters, by what only their keys have.
_OTHER_KINDS = (
    (r"\.dora_scale$|\.lora_magnitude_vector", "DoRA"),
    (r"\.hada_[wt]", "LoHa"),
    (r"\.lokr_[wt]", "LoKr"),
    (r"\.on_input$|\.ia3_", "IA3"),
    (r"[._]b?oft_", "OFT"),
    (r"\.diff(_b)?$", "the full difference of a layer"),
    (r"\.(w_norm|b_norm)$", "a trained norm layer"),
    (r"\.[ab][12]\.weight$", "GLoRA"),
    (r"\.lora_mid\.", "a Tucker (CP) decomposition of a convolution, lora_mid"),
    (r"^bundle_emb\.|^emb_params$|\.emb_params$", "a trained embedding (textual inversion)"),
    (r"\.lora_embedding_", "LoRA of an embedding"),
    (r"\.(lora_down|lora_up|lora_A|lora_B)(\.[\w-]+)?\.bias$", "LoRA with a bias"),
    (r"\.scalar$", "LoRA with a trained scalar"),
    (r"\.vera_lambda_", "VeRA"),
)


class Layer(NamedTuple):
    """A layer of a pipeline: its part, and its path in the tree of the part."""

    part: str
    path: tuple[str, ...]


class LayerKeys(NamedTuple):
    """Keys of the down matrix, the up matrix and the scalar alpha of one layer."""

    down: str
    up: str
    alpha: str


def module_name(path: tuple[str, ...]) -> str:
    """The layer's name in diffusers, for example ``down_blocks.0.attentions.0. ... .attn1.to_out.0``."""
    return names.torch_key((*path, "kernel")).removesuffix(".weight")


def diffusers_keys(layer: Layer) -> LayerKeys:
    """The keys that diffusers' own trainers write: peft's names in the UNet, older ones in the text encoders.

    In text encoders diffusers' reader understands peft's names of the attention projections only.
    """
    module = f"{layer.part}.{module_name(layer.path)}"
    down, up = ("lora_A", "lora_B") if layer.part == UNET else ("lora_linear_layer.down", "lora_linear_layer.up")
    return LayerKeys(f"{module}.{down}.weight", f"{module}.{up}.weight", f"{module}.alpha")


def kohya_keys(layer: Layer, unet_shapes: PyTree) -> LayerKeys:
    """The keys that the kohya trainer writes, and that it, ComfyUI, A1111 and diffusers read.

    For SD1.x and SD2.x these are diffusers' names, for SDXL those of the original UNet (``input_blocks_4_1_...``): the
    trainer runs another UNet there, and its own tools know no other names.
    """
    module, sdxl = module_name(layer.path), is_sdxl(unet_shapes)
    if layer.part == UNET and sdxl:
        module = unet_name(module, unet_shapes)
    prefix = _KOHYA[layer.part][-1 if sdxl else 0]
    name = prefix + module.replace(".", "_")
    return LayerKeys(f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha")


def spellings(shapes: Mapping[str, PyTree]) -> dict[str, Layer]:
    """Every layer that can be adapted, by every name that a file may call it; ``shapes`` are trees by part."""
    layers: dict[str, Layer] = {}
    # The first text encoder comes last, because a name without prefix is its own.
    for part in reversed(PARTS):
        for path in flax.traverse_util.flatten_dict(shapes.get(part, {})):
            if path[-1] != "kernel":
                continue
            layer, module = Layer(part, path[:-1]), module_name(path[:-1])
            # transformers 5 leaves out the first part of the names in text encoders.
            other = unet_name(module, shapes[UNET]) if part == UNET else module.removeprefix("text_model.")
            for name in (module, other):
                dotted = [prefix + name for prefix in ("", *_DOTTED[part])]
                underscored = [prefix + name.replace(".", "_") for prefix in _KOHYA[part]]
                layers |= dict.fromkeys((*dotted, *underscored), layer)
    return layers


class Key(NamedTuple):
    """What a key says: the role, ``"down"``, ``"up"`` or ``"alpha"``, of a tensor of the layer named ``module``."""

    module: str
    role: str


def parse_key(key: str) -> Key | None:
    """The layer and the role of a key; None if it is none of a LoRA."""
    match = _MATRIX.fullmatch(key)
    if match is not None:
        return Key(_plain(match[1]), _ROLES[match[2]])
    if key.endswith(".alpha"):
        module = re.sub(r"(\.lora|\.lora_linear_layer|_lora)$", "", key.removesuffix(".alpha"))
        return Key(_plain(module), "alpha")
    return None


def _plain(module: str) -> str:
    """The layer's name without wrappers, and without those that attention layers had as processors, in early 2023."""
    module = module.replace("base_model.model.", "", 1).replace(".processor.", ".")
    module = re.sub(r"(\.self_attn)\.to_(q|k|v|out)$", r"\1.\2_proj", module)
    return re.sub(r"\.to_out$", ".to_out.0", module)


def counterpart(key: str) -> str:
    """Key of the up matrix that belongs to that of a down matrix, and the other way round."""
    match = _MATRIX.fullmatch(key)
    assert match is not None
    return key[: match.start(2)] + _OTHER[match[2]] + key[match.end(2) :]


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """The first key of another kind of adapter than LoRA, and the kind's name; None if there is none."""
    for key in sorted(keys):
        for pattern, kind in _OTHER_KINDS:
            if re.search(pattern, key):
                return key, kind
    return None


def text_encoder_of(key: str) -> str | None:
    """The text encoder that a key is about, whatever its layer; None if it is about none."""
    plain = key.replace("base_model.model.", "", 1)
    for part in reversed(TEXT_ENCODERS):
        if plain.startswith((*_DOTTED[part], *_KOHYA[part])):
            return part
    return TEXT_ENCODERS[0] if plain.startswith(("text_model.", "encoder.layers.")) else None


def text_width(key: str, shape: tuple[int, ...]) -> int | None:
    """Width of the text embeddings that a UNet takes, if the key is a down matrix that they go through."""
    parsed = parse_key(key)
    if parsed is None or parsed.role != "down" or len(shape) < 2:
        return None
    return shape[1] if re.search(r"attn2[._]to_[kv]$", parsed.module) else None


def text_widths(unet_shapes: PyTree) -> set[int]:
    """Width of the text embeddings that a UNet takes; empty if it takes none."""
    flat = flax.traverse_util.flatten_dict(unet_shapes)
    return {x.shape[0] for path, x in flat.items() if path[-3:-1] in (("attn2", "to_k"), ("attn2", "to_v"))}


def is_sdxl(unet_shapes: PyTree) -> bool:
    """Whether a UNet with these parameters is SDXL's, which alone embeds sizes and pooled text."""
    return "add_embedding" in unet_shapes
