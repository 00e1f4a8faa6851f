"""Names of layers in the original checkpoints of Stable Diffusion, which single files and trainers keep.

The original UNet numbers the layers of all blocks through (``input_blocks.4.1...``); diffusers numbers blocks, and the
layers in each. The original autoencoder numbers its levels from the image inwards, in the decoder too. SD1.x and SDXL's
first text encoder have transformers' names, SD2.x and SDXL's second one those of open_clip.
"""

from __future__ import annotations

import re

from jaxtyping import PyTree

_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_INSIDE_BLOCKS = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.(.+)"
)
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_VAE_LEVEL = re.compile(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|(?:down|up)samplers)\.(\d+)\.(.+)")
_OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_projection": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.q_proj": "attn.in_proj",
    "self_attn.k_proj": "attn.in_proj",
    "self_attn.v_proj": "attn.in_proj",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_name(module: str, shapes: PyTree) -> str:
    """Original name of a layer of the UNet.

    A block has as many numbers as it has resnets on the up path. That is one more than on the down path, where the last
    number is the downsampler's; number 0 of the down path is the first convolution.

    Args:
      module: the layer's name in diffusers, such as ``down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q``.
      shapes: UNet parameters or their shapes; names of blocks are read.
    """
    if module in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[module]
    match = _INSIDE_BLOCKS.fullmatch(module)
    if match is None:
        raise ValueError(f"{module!r} is no layer of a UNet")
    way, block, kind, layer, rest = match.groups()
    if kind == "resnets":
        rest = _RESNET[rest]
    if way is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}"
    numbers = 1 + sum(name.startswith("resnets_") for name in shapes.get("down_blocks_0", ()))
    first = int(block) * numbers
    if kind == "downsamplers":
        return f"input_blocks.{first + numbers}.0.op"
    if kind == "upsamplers":
        attends = "attentions_0" in shapes[f"up_blocks_{block}"]
        return f"output_blocks.{first + numbers - 1}.{2 if attends else 1}.conv"
    place = 1 if kind == "attentions" else 0
    if way == "down":
        return f"input_blocks.{first + int(layer) + 1}.{place}.{rest}"
    return f"output_blocks.{first + int(layer)}.{place}.{rest}"


def vae_name(module: str, num_levels: int) -> str:
    """Original name of a layer of an autoencoder of ``num_levels`` resolutions, for its name in diffusers."""
    match = _VAE_LEVEL.fullmatch(module)
    if match is None:
        for theirs, original in _VAE.items():
            module = re.sub(rf"(?<=\.){re.escape(theirs)}(?=\.|$)", original, module)
        return module
    half, block, kind, layer, rest = match.groups()
    way, level = ("down", int(block)) if half == "encoder" else ("up", num_levels - 1 - int(block))
    if kind == "resnets":
        return f"{half}.{way}.{level}.block.{layer}.{_VAE.get(rest, rest)}"
    return f"{half}.{way}.{level}.{way}sample.{rest}"


def open_clip_key(key: str) -> str:
    """Original key of a parameter of a text encoder of open_clip, for its key in transformers.

    Queries, keys and values of a layer are one parameter there, one below the other.
    """
    module, _, leaf = key.rpartition(".")
    if module in _OPEN_CLIP:
        bare = module.endswith(("position_embedding", "text_projection"))  # parameters there, not layers
        return _OPEN_CLIP[module] if bare else f"{_OPEN_CLIP[module]}.{leaf}"
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", module)
    if match is None or match[2] not in _OPEN_CLIP_LAYER:
        raise ValueError(f"{key!r} is no parameter of a text encoder")
    original = _OPEN_CLIP_LAYER[match[2]]
    joint = "_" if original.endswith("in_proj") else "."
    return f"transformer.resblocks.{match[1]}.{original}{joint}{leaf}"
