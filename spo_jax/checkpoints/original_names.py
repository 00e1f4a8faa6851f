"""Names of the UNet's layers in the original checkpoints of Stable Diffusion, which single files and trainers keep.

The original UNet counts through all blocks (``input_blocks.4.1...``); diffusers counts blocks, and layers in each.
"""

from __future__ import annotations

import re
from typing import Any

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


def unet_name(module: str, shapes: Any) -> str:
    """Original name of a layer of the UNet.

    A block takes as many numbers as it has resnets on the way up, one more than on the way down, where a downsampler
    has the last one; number 0 of the way down is the first convolution.

    Args:
      module: the layer's name in diffusers, such as ``down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q``.
      shapes: UNet parameters or their shapes; names of blocks are read.
    """
    if module in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[module]
    match = re.fullmatch(
        r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|(?:down|up)samplers)\.(\d+)\.(.+)", module
    )
    if match is None:
        raise ValueError(f"{module!r} is no layer of a UNet")
    way, block, kind, layer, rest = match.groups()
    if kind == "resnets":
        rest = _RESNET[rest]
    if way is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}"
    numbers = layers_per_block(shapes) + 1
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


def layers_per_block(shapes: Any) -> int:
    """Resnets of the UNet's first block."""
    return sum(name.startswith("resnets_") for name in shapes.get("down_blocks_0", ()))
