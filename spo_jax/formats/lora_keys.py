"""How LoRA files name the layers that they adapt, and what else than plain LoRA their keys tell.

A layer is known by its part, ``"unet"``, ``"text_encoder"`` or ``"text_encoder_2"``, and behind it the path that it has
in the part's tree: ``("unet", "down_blocks_0", "attentions_0", ..., "attn1", "to_out_0")``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import flax.traverse_util
from jaxtyping import PyTree

from spo_jax.formats import names
from spo_jax.formats.original_layout import unet_name

UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")
PARTS = (UNET, *TEXT_ENCODERS)
Layer = tuple[str, ...]
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


def module_name(layer: Layer) -> str:
    """The layer's name in its part in diffusers, for example ``down_blocks.0.attentions.0. ... .attn1.to_out.0``."""
    return names.torch_key((*layer[1:], "kernel")).removesuffix(".weight")


def kohya_name(layer: Layer, unet_shapes: PyTree) -> str:
    """The name by which the kohya trainer, ComfyUI, A1111 and diffusers know a layer.

    For SD1.x and SD2.x these are diffusers' names, for SDXL those of the original UNet (``input_blocks_4_1_...``): the
    trainer runs another UNet there, and its own tools know no other names.
    """
    module, sdxl = module_name(layer), "add_embedding" in unet_shapes
    if layer[0] == UNET and sdxl:
        module = unet_name(module, unet_shapes)
    return _KOHYA[layer[0]][-1 if sdxl else 0] + module.replace(".", "_")


def spellings(shapes: Mapping[str, PyTree]) -> dict[str, Layer]:
    """Every layer that can be adapted, by every name that a file may call it; ``shapes`` are trees by part."""
    layers: dict[str, Layer] = {}
    # The first text encoder comes last, because a name without prefix is its own.
    for part in reversed(PARTS):
        for path in flax.traverse_util.flatten_dict(shapes.get(part, {})):
            if path[-1] == "kernel":
                layer = (part, *path[:-1])
                module = module_name(layer)
                # transformers 5 leaves out the first part of the names in text encoders.
                other = unet_name(module, shapes[UNET]) if part == UNET else module.removeprefix("text_model.")
                for name in (module, other):
                    layers |= dict.fromkeys([prefix + name for prefix in ("", *_DOTTED[part])], layer)
                    layers |= dict.fromkeys([prefix + name.replace(".", "_") for prefix in _KOHYA[part]], layer)
    return layers


def parse_key(key: str) -> tuple[str, str]:
    """A layer's name, and what the key has of it: ``"down"``, ``"up"`` or ``"alpha"``; "" and "" for none of LoRA's."""
    if match := _MATRIX.fullmatch(key):
        module, role = match[1], _ROLES[match[2]]
    elif key.endswith(".alpha"):
        module, role = re.sub(r"(\.lora|\.lora_linear_layer|_lora)$", "", key.removesuffix(".alpha")), "alpha"
    else:
        return "", ""
    # Without wrappers, and without those that attention layers had as processors, in early 2023.
    module = module.replace("base_model.model.", "", 1).replace(".processor.", ".")
    module = re.sub(r"(\.self_attn)\.to_(q|k|v|out)$", r"\1.\2_proj", module)
    return re.sub(r"\.to_out$", ".to_out.0", module), role


def counterpart(key: str) -> str:
    """Key of the up matrix that belongs to that of a down matrix, and the other way round."""
    match = _MATRIX.fullmatch(key)
    assert match is not None
    return key[: match.start(2)] + _OTHER[match[2]] + key[match.end(2) :]


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """The first key of another kind of adapter than LoRA, and the kind's name; None if there is none."""
    found = ((key, kind) for key in sorted(keys) for pattern, kind in _OTHER_KINDS if re.search(pattern, key))
    return next(found, None)


def text_encoder_of(key: str) -> str | None:
    """The text encoder that a key is about, whatever its layer; None if it is about none."""
    plain = key.replace("base_model.model.", "", 1)
    prefixes = {part: (*_DOTTED[part], *_KOHYA[part]) for part in reversed(TEXT_ENCODERS)}
    prefixes[TEXT_ENCODERS[0]] += ("text_model.", "encoder.layers.")
    return next((part for part, starts in prefixes.items() if plain.startswith(starts)), None)


def text_width(key: str, shape: tuple[int, ...]) -> int | None:
    """Width of the text embeddings that a UNet takes, if the key is a down matrix that they go through."""
    module, role = parse_key(key)
    return shape[1] if role == "down" and len(shape) >= 2 and re.search(r"attn2[._]to_[kv]$", module) else None


def text_widths(unet_shapes: PyTree) -> set[int]:
    """Width of the text embeddings that a UNet takes; empty if it takes none."""
    flat = flax.traverse_util.flatten_dict(unet_shapes)
    return {x.shape[0] for path, x in flat.items() if path[-3:-1] in (("attn2", "to_k"), ("attn2", "to_v"))}
