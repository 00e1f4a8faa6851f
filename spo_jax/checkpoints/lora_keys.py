"""How LoRA files name the matrices of an adapted layer: a table of spellings, each from the path of the layer.

A path is that of the layer in our trees, ``("down_blocks_0", "attentions_0", ..., "attn1", "to_out_0")``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from spo_jax.checkpoints import names
from spo_jax.checkpoints.original_names import unet_name


@dataclasses.dataclass(frozen=True)
class LayerKeys:
    """Keys of the down matrix [r, in], the up matrix [out, r] and the scalar alpha of one layer."""

    down: str
    up: str
    alpha: str


def module_name(path: tuple[str, ...]) -> str:
    """The layer's name in diffusers, for example ``down_blocks.0.attentions.0. ... .attn1.to_out.0``."""
    return names.torch_key((*path, "kernel")).removesuffix(".weight")


def diffusers_keys(path: tuple[str, ...]) -> LayerKeys:
    """As diffusers writes it today: peft's names behind ``unet.``."""
    module = f"unet.{module_name(path)}"
    return LayerKeys(f"{module}.lora_A.weight", f"{module}.lora_B.weight", f"{module}.alpha")


def kohya_keys(path: tuple[str, ...], shapes: Any) -> LayerKeys:
    """As the kohya trainer writes it, and ComfyUI, A1111, diffusers and the trainer itself read it.

    For SD1.x and SD2.x these are diffusers' names, for SDXL those of the original UNet (``input_blocks_4_1_...``): the
    trainer runs another UNet there, and its own tools know no other names.

    Args:
      path: of the layer.
      shapes: UNet parameters or their shapes.
    """
    module = module_name(path)
    return _kohya_keys(unet_name(module, shapes) if is_sdxl(shapes) else module)


def spellings(path: tuple[str, ...], shapes: Any) -> Iterator[LayerKeys]:
    """Every spelling that is read, newest first; arguments as in ``kohya_keys``."""
    yield diffusers_keys(path)
    module = module_name(path)
    # diffusers before peft; the released SPO adapters.
    yield LayerKeys(f"unet.{module}.lora.down.weight", f"unet.{module}.lora.up.weight", f"unet.{module}.alpha")
    # diffusers' attention processors of early 2023; `save_attn_procs` left out the prefix.
    block, projection = module.removesuffix(".0").rsplit(".", 1)
    for prefix in ("unet.", ""):
        layer = f"{prefix}{block}.processor.{projection}_lora"
        yield LayerKeys(f"{layer}.down.weight", f"{layer}.up.weight", f"{layer}.alpha")
    yield _kohya_keys(module)
    yield _kohya_keys(unet_name(module, shapes))


def is_sdxl(shapes: Any) -> bool:
    """Whether a UNet with these parameters is SDXL's, which alone embeds sizes and pooled text."""
    return "add_embedding" in shapes


def _kohya_keys(module: str) -> LayerKeys:
    layer = "lora_unet_" + module.replace(".", "_")
    return LayerKeys(f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha")
