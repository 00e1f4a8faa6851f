"""Configs of the models in a single file: the published ones, with the sizes of the file's arrays.

The file does not tell the numbers of heads and of groups, the size of images and the noise schedule: they are those of
the published models, as in diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from spo_jax.errors import UserError
from spo_jax.formats.json_files import Json
from spo_jax.formats.original_layout import LAYOUTS, UNET, V_PREDICTION, VAE, ZERO_SNR
from spo_jax.formats.stored import StoredArray
from spo_jax.models import published

Arrays = Mapping[str, StoredArray]
HEAD_SIZE = 64  # channels of a head, in all published models but SD1.x, which has 8 heads everywhere
_GROUPS = 32
_PUBLISHED = {
    "SD1": published.PIPELINES["stable-diffusion-v1-5/stable-diffusion-v1-5"],
    "SD2": published.PIPELINES["stabilityai/stable-diffusion-2-1"],
    "SDXL": published.PIPELINES["stabilityai/stable-diffusion-xl-base-1.0"],
}
_SD2_BASE_STEPS = 875_000  # by which diffusers knows stable-diffusion-2-base
_SD2_BASE_SIZE = 64  # of its latents
_STABILITY = "https://github.com/Stability-AI/generative-models"
_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}


def pipeline_configs(
    path: Path, kind: str, arrays: Arrays, prediction_type: str, given: Mapping[str, Json] | None = None
) -> dict[str, Json]:
    """The configs of a pipeline in a single file, "index", "scheduler" and one for each part, as diffusers takes them.

    Args:
      path: of the file, for messages.
      kind: "SD1", "SD2" or "SDXL".
      arrays: of the file.
      prediction_type: what the UNet predicts, if no scheduler is given.
      given: those of the configs that are known.

    Raises:
      UserError: a key that tells a size is missing, or the sizes do not tell the number of heads or groups.
    """
    marked = {"rescale_betas_zero_snr": True} if ZERO_SNR in arrays else {}
    configs = {
        "index": dict(_PUBLISHED[kind]["model_index"]),
        "scheduler": _PUBLISHED[kind]["scheduler"] | {"prediction_type": prediction_type} | marked,
    } | dict(given or {})
    for part in LAYOUTS[kind]:
        if part not in configs:
            configs[part] = part_config(path, kind, part, arrays)
            if part == "unet" and kind == "SD2" and configs["scheduler"].get("prediction_type", "epsilon") == "epsilon":
                configs[part]["sample_size"] = _SD2_BASE_SIZE
    return configs


def part_config(path: Path, kind: str, part: str, arrays: Arrays) -> Json:
    """The ``config.json`` of a part, in diffusers' or transformers' fields; arguments as of ``pipeline_configs``."""
    sizes, config = _Sizes(path, arrays), _PUBLISHED[kind][part]
    if part == "unet":
        return config | _unet(sizes, kind)
    return config | (_vae(sizes) if part == "vae" else _text_encoder(sizes, *LAYOUTS[kind][part]))


def recorded_prediction_type(
    path: Path, kind: str, arrays: Arrays, metadata: Mapping[str, str], beside: Json
) -> str | None:
    """What the UNet predicts, as far as a single file tells; None for an SD2.x that does not.

    A safetensors file may tell it in the ``metadata`` of its header (UserError if that names an unknown type), a
    PyTorch file by values ``beside`` its ``state_dict``.
    """
    said = metadata.get("modelspec.prediction_type")
    if said is not None:
        if said not in _PREDICTION_TYPES:
            raise UserError(f"File {path}: its header says modelspec.prediction_type = {said!r}, not epsilon or v.")
        return _PREDICTION_TYPES[said]
    if V_PREDICTION in arrays:
        return "v_prediction"
    if kind != "SD2":
        return "epsilon"
    if beside.get("global_step") == _SD2_BASE_STEPS:
        return "epsilon"
    return _ARCHITECTURES.get(metadata.get("modelspec.architecture", ""))


def model_spec(
    kind: str, title: str, prediction_type: str, image_size: tuple[int, int] | None, *, is_lora: bool = False
) -> dict[str, str]:
    """The header of a file after Stability AI's ModelSpec 1.0, by which programs tell and show what the file is.

    ``kind`` is "SD1", "SD2" or "SDXL", and ``image_size`` [height, width] of what the model was made for, if known.
    """
    v2 = "stable-diffusion-v2-768-v" if prediction_type == "v_prediction" else "stable-diffusion-v2-512"
    architecture = {"SD1": "stable-diffusion-v1", "SD2": v2, "SDXL": "stable-diffusion-xl-v1-base"}[kind]
    header = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora" if is_lora else architecture,
        "modelspec.implementation": "diffusers" if is_lora and kind != "SDXL" else _STABILITY,
        "modelspec.title": title,
    }
    if prediction_type in ("epsilon", "v_prediction"):  # the specification knows no others
        header["modelspec.prediction_type"] = "v" if prediction_type == "v_prediction" else "epsilon"
    if image_size is not None:
        height, width = image_size
        header["modelspec.resolution"] = f"{width}x{height}"
    return header


class _Sizes:
    """Shapes of a file's arrays, and how many layers of a name there are."""

    def __init__(self, path: Path, arrays: Arrays):
        self._path, self._arrays = path, arrays

    def of(self, key: str, axis: int) -> int:
        if key not in self._arrays:
            raise UserError(f"File {self._path} has no key {key!r}; it is not complete, get it from its source again.")
        shape = self._arrays[key].shape
        if not 1 <= len(shape) <= 4 or axis >= len(shape) or not shape[axis]:
            raise UserError(f"File {self._path}: {key!r} has the shape {shape}, which no Stable Diffusion has.")
        return shape[axis]

    def ndim(self, key: str) -> int:
        self.of(key, 0)
        return len(self._arrays[key].shape)

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self._arrays)

    def count(self, prefix: str) -> int:
        """Layers ``prefix0.``, ``prefix1.``, ..."""
        numbers = {key[len(prefix) :].partition(".")[0] for key in self._arrays if key.startswith(prefix)}
        found = 0
        while str(found) in numbers:
            found += 1
        return found

    def divided(self, channels: int, divisor: int, what: str) -> int:
        if channels % divisor:
            raise UserError(
                f"File {self._path}: a layer of {channels} channels is not that of a published model, and {what} is "
                f"not in the file; put the configs of its pipeline, unet/config.json and so on, into "
                f"{self._path.with_suffix('.config')}."
            )
        return channels // divisor


def _unet(sizes: _Sizes, kind: str) -> Json:
    levels: list[list[int]] = [[]]
    for i in range(1, sizes.count(f"{UNET}input_blocks.")):
        if sizes.has(f"{UNET}input_blocks.{i}.0.op."):
            levels.append([])
        else:
            levels[-1].append(i)
    # Where levels are not alike, the keys that do not fit are named when the parameters are looked for.
    firsts = [level[0] if level else 1 for level in levels]
    widths = [sizes.of(f"{UNET}input_blocks.{first}.0.out_layers.3.weight", 0) for first in firsts]
    depths = [sizes.count(f"{UNET}input_blocks.{first}.1.transformer_blocks.") for first in firsts]
    middle = sizes.count(f"{UNET}middle_block.1.transformer_blocks.")
    for width in widths:
        sizes.divided(width, _GROUPS, "the number of groups of its normalization")
    config: Json = {
        "in_channels": sizes.of(f"{UNET}input_blocks.0.0.weight", 1),
        "out_channels": sizes.of(f"{UNET}out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": [f"{'CrossAttn' if depth else ''}DownBlock2D" for depth in depths],
        "up_block_types": [f"{'CrossAttn' if depth else ''}UpBlock2D" for depth in depths[::-1]],
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [depths[-1] or middle or 1],
        "cross_attention_dim": sizes.of(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "use_linear_projection": sizes.ndim(f"{UNET}middle_block.1.proj_in.weight") == 2,
    }
    what = "the number of its attention heads"
    if kind == "SD1":
        for width in widths:
            sizes.divided(width, config.setdefault("attention_head_dim", 8), what)
    else:
        config["attention_head_dim"] = [sizes.divided(width, HEAD_SIZE, what) for width in widths]
    if kind == "SDXL":
        config["projection_class_embeddings_input_dim"] = sizes.of(f"{UNET}label_emb.0.0.weight", 1)
    return config


def _vae(sizes: _Sizes) -> Json:
    num_levels = sizes.count(f"{VAE}encoder.down.")
    widths = [sizes.of(f"{VAE}encoder.down.{i}.block.0.conv2.weight", 0) for i in range(max(1, num_levels))]
    for width in widths:
        sizes.divided(width, _GROUPS, "the number of groups of its normalization")
    return {
        "in_channels": sizes.of(f"{VAE}encoder.conv_in.weight", 1),
        "out_channels": sizes.of(f"{VAE}decoder.conv_out.weight", 0),
        "latent_channels": sizes.of(f"{VAE}decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": sizes.count(f"{VAE}encoder.down.0.block."),
    }


def _text_encoder(sizes: _Sizes, whose: str, prefix: str) -> Json:
    if whose == "clip":
        inner = f"{prefix}text_model." if sizes.has(f"{prefix}text_model.") else prefix
        tokens, positions = (f"{inner}embeddings.{name}_embedding.weight" for name in ("token", "position"))
        layers, wide = f"{inner}encoder.layers.", "mlp.fc1.weight"
    else:
        tokens, positions = f"{prefix}token_embedding.weight", f"{prefix}positional_embedding"
        layers, wide = f"{prefix}transformer.resblocks.", "mlp.c_fc.weight"
    width = sizes.of(tokens, 1)
    config = {
        "vocab_size": sizes.of(tokens, 0),
        "max_position_embeddings": sizes.of(positions, 0),
        "hidden_size": width,
        "num_attention_heads": sizes.divided(width, HEAD_SIZE, "the number of its attention heads"),
        "intermediate_size": sizes.of(f"{layers}0.{wide}", 0),
        "num_hidden_layers": sizes.count(layers),
    }
    if whose == "clip":
        return config
    if prefix == LAYOUTS["SD2"]["text_encoder"][1]:
        # SD2.x takes what the last but one layer of OpenCLIP ViT-H gives, so that 23 of its 24 layers are used.
        return config | {"num_hidden_layers": min(sizes.count(layers), published.TEXT_SD21["num_hidden_layers"])}
    return config | {"projection_dim": sizes.of(f"{prefix}text_projection", 1)}
