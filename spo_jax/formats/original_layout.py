"""Single files in the original layout of Stable Diffusion: their kinds, and where each parameter lies in them.

The original UNet numbers the layers of all blocks through (``input_blocks.4.1...``); diffusers numbers blocks, and the
layers in each. The original autoencoder numbers its levels from the image inwards, in the decoder too. SD1.x and SDXL's
first text encoder have transformers' names, SD2.x and SDXL's second one those of open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax
from jaxtyping import PyTree

from spo_jax.errors import UserError
from spo_jax.formats import names
from spo_jax.formats.pipeline_files import OTHER_KINDS
from spo_jax.formats.stored import StoredArray

UNET, VAE = "model.diffusion_model.", "first_stage_model."
_UNET_PART, _VAE_PART = ("unet", UNET), ("vae", VAE)
# By kind and part: whose names the parameters have, and what all of them begin with.
LAYOUTS: dict[str, dict[str, tuple[str, str]]] = {
    "SD1": {"unet": _UNET_PART, "vae": _VAE_PART, "text_encoder": ("clip", "cond_stage_model.transformer.")},
    "SD2": {"unet": _UNET_PART, "vae": _VAE_PART, "text_encoder": ("open_clip", "cond_stage_model.model.")},
    "SDXL": {
        "unet": _UNET_PART,
        "vae": _VAE_PART,
        "text_encoder": ("clip", "conditioner.embedders.0.transformer."),
        "text_encoder_2": ("open_clip", "conditioner.embedders.1.model."),
    },
}
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # keys without values that newer files carry
FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"

# What holds no information that is used here: averages of the UNet, of which diffusers reads none either; the noise
# schedule; buffers of text encoders; projections and layers behind what Stable Diffusion takes from them; what the
# autoencoder was trained with.
LEFT_OUT = re.compile(
    r"model_ema\..*|first_stage_model\.(model_ema|loss)\..*|denoiser\.sigmas"
    rf"|{V_PREDICTION}|{ZERO_SNR}"
    r"|betas|logvar|lvlb_weights|(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)"
    r"|(cond_stage_model|conditioner\.embedders\.[01])\.(.*\.)?(position_ids|attn_mask|logit_scale)"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.(transformer\.|model\.)?text_projection(\.weight)?"
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\..*"
)
_WANTED = "--model and config.model take a diffusers folder, or Stable Diffusion 1.x, 2.x or SDXL base in one file"
# Other files that people have, by what some of their keys contain; the first that fits.
_OTHERS = (
    (r"^lora_|\.lora_(A|B|down|up)\.|\.lora\.(down|up)\.|lora_linear_layer|\.hada_w1_|\.lokr_w1", "a LoRA file"),
    (r"^control_model\.|^input_hint_block\.|^controlnet_|zero_conv", "a ControlNet"),
    (r"joint_blocks\.", "a Stable Diffusion 3"),
    (r"double_blocks\.|double_stream_blocks\.", "a model such as Flux"),
    (r"motion_modules\.", "a motion module of AnimateDiff"),
    (r"^image_proj\.|^ip_adapter\.", "an IP-Adapter"),
    (r"^emb_params$|^string_to_param|^clip_[lg]$", "a textual inversion"),
    (r"^edm_mean$|^edm_vpred\.sigma_max$", "a model with the noise levels of EDM, such as Playground 2.5"),
    (r"\.time_stack\.|\.time_mixer\.", "a video model"),
)
_ALONE = (
    (rf"^({re.escape(UNET)})?input_blocks\.|^down_blocks\.", "a UNet alone"),
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(down|up|mid|conv_in)", "an autoencoder alone"),
    (r"^(cond_stage_model|conditioner|text_model|embeddings|encoder\.layers)\.|resblocks\.", "text encoders alone"),
)
_ADVICE = {
    "a LoRA file": "give it as --lora, and its base model as --model",
    "an autoencoder alone": "as a diffusers folder it can be given as --vae or config.vae",
}
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
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.q_proj": "attn.in_proj",
    "self_attn.k_proj": "attn.in_proj",
    "self_attn.v_proj": "attn.in_proj",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


class Original(NamedTuple):
    """Where a parameter, in PyTorch's layout, lies in a single file."""

    key: str
    third: int | None = None  # 0, 1 or 2 for queries, keys and values, which open_clip keeps in one parameter
    transposed: bool = False
    convolution: bool = False  # a dense layer that is a 1x1 convolution there

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file of the whole parameter, of which one (a third) has the shape ``ours``."""
        if self.third is not None:
            return (3 * ours[0], *ours[1:])
        if self.convolution:
            return (*ours, 1, 1)
        return ours[::-1] if self.transposed else ours

    def view(self, stored: StoredArray, ours: tuple[int, ...]) -> StoredArray:
        """The parameter, of the shape ``ours``, in what the file has under the key."""
        if self.third is not None:
            return stored.rows(self.third * ours[0], (self.third + 1) * ours[0])
        if self.convolution:
            return stored.without_last_ones(len(ours))
        return stored.transposed() if self.transposed else stored


def originals(kind: str, part: str, shapes: PyTree) -> dict[tuple[str, ...], Original]:
    """Where each parameter of a part lies in a single file of a kind, by the parameter's path in ``shapes``."""
    whose, prefix = LAYOUTS[kind][part]
    num_levels = sum(name.startswith("down_blocks_") for name in shapes.get("encoder", ()))

    def one(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> Original:
        key = names.torch_key(path)
        module, _, what = key.rpartition(".")
        if whose == "unet":
            return Original(f"{prefix}{unet_name(module, shapes)}.{what}")
        if whose == "vae":
            dense = path[-1] == "kernel" and len(leaf.shape) == 2
            return Original(f"{prefix}{vae_name(module, num_levels)}.{what}", convolution=dense)
        if whose == "clip":
            return Original(prefix + key)
        third = re.search(r"\.self_attn\.([qkv])_proj\.", key)
        return Original(
            prefix + open_clip_key(key),
            third="qkv".index(third[1]) if third else None,
            transposed=module == "text_projection",
        )

    return {path: one(path, leaf) for path, leaf in flax.traverse_util.flatten_dict(shapes).items()}


def unet_name(module: str, shapes: PyTree) -> str:
    """Original name of a layer of the UNet, for its name in diffusers; of ``shapes``, its parameters, names are read.

    A block has as many numbers as it has resnets on the up path. That is one more than on the down path, where the last
    number is the downsampler's; number 0 of the down path is the first convolution.
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
    number = first + int(layer) + (way == "down")
    return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{1 if kind == 'attentions' else 0}.{rest}"


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
    """Original key of a parameter of open_clip's text encoders, where queries, keys and values are one, one below the
    other, for its key in transformers."""
    module, _, leaf = key.rpartition(".")
    if module in _OPEN_CLIP:
        bare = module.endswith(("position_embedding", "text_projection"))  # parameters there, not layers
        return _OPEN_CLIP[module] if bare else f"{_OPEN_CLIP[module]}.{leaf}"
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", module)
    if match is None or match[2] not in OPEN_CLIP_LAYER:
        raise ValueError(f"{key!r} is no parameter of a text encoder")
    original = OPEN_CLIP_LAYER[match[2]]
    joint = "_" if original.endswith("in_proj") else "."
    return f"transformer.resblocks.{match[1]}.{original}{joint}{leaf}"


def kind_of(path: Path, arrays: Mapping[str, StoredArray]) -> str:
    """ "SD1", "SD2" or "SDXL", by the keys of a single file; UserError if it is another kind, which is named."""
    every = {prefix for layout in LAYOUTS.values() for _, prefix in layout.values()}
    prefixes = {prefix for prefix in every if any(key.startswith(prefix) for key in arrays)}
    is_part = UNET not in prefixes or prefixes == {UNET}
    for pattern, what in (*_OTHERS, *(_ALONE if is_part else ())):
        if any(re.search(pattern, key) for key in arrays):
            raise _refusal(path, what)
    if is_part:
        listed = ", ".join(sorted(arrays)[:3]) or "none"
        raise _refusal(path, f"a file of a kind that is not known here (keys: {listed}{', ...' if arrays else ''})")
    shape = arrays[FIRST_CONVOLUTION].shape if FIRST_CONVOLUTION in arrays else ()
    if len(shape) == 4 and shape[1] != 4:
        raise _refusal(path, OTHER_KINDS.get(shape[1], f"a model whose UNet takes {shape[1]} channels"))
    labels = any(key.startswith(f"{UNET}label_emb.") for key in arrays)
    if any(key.startswith("conditioner.embedders.0.model.") for key in arrays):
        raise _refusal(path, "an SDXL refiner" if labels else "a model in another layout, such as SD-Turbo")
    for kind in ("SDXL", "SD2", "SD1"):
        needed = [prefix for _, prefix in LAYOUTS[kind].values()]
        if needed[-1] not in prefixes:
            continue
        if labels != (kind == "SDXL"):
            raise _refusal(path, "an unCLIP or another model with other conditions than text")
        for prefix in needed:
            if prefix not in prefixes:
                raise UserError(f"File {path} has no keys {prefix}*; it is not complete, get it from its source again.")
        return kind
    raise UserError(f"File {path} has a UNet, but no text encoder that is known here; {_WANTED}.")


def _refusal(path: Path, what: str) -> UserError:
    return UserError(f"File {path} is {what}; {_ADVICE.get(what, _WANTED)}.")
