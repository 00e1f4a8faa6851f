"""A whole pipeline in one file, in the original layout of Stable Diffusion 1.x, 2.x and SDXL base.

Configs and tokenizers are not in such a file. They are those of the published pipelines, with sizes from the file,
which does not tell numbers of heads and groups, the size of images and the noise schedule. But a folder beside it comes
first, ``FILE.config`` for ``FILE.safetensors``, as far as it has a diffusers pipeline's files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import flax.traverse_util
from jaxtyping import PyTree

from spo_jax.errors import UserError, notice
from spo_jax.formats import names
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.original_layout import LAYOUTS, LEFT_OUT, UNET, V_PREDICTION, VAE, ZERO_SNR, kind_of, originals
from spo_jax.formats.pipeline_files import INDEX, SCHEDULER, XL, PipelineFiles, tokenizer_of
from spo_jax.formats.stored import StoredArray
from spo_jax.formats.torch_bin import index_training_checkpoint
from spo_jax.formats.weights import TORCH_SUFFIXES, Weights, open_file
from spo_jax.models import published

CLIP_VOCABULARY = 49_408
_SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
_SDXL = "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"
# SD2.x's tokenizer is SDXL's second one: CLIP's vocabulary, padded with 0 as open_clip does.
TOKENIZERS = {
    "SD1": {"tokenizer": f"{_SD15}/tokenizer"},
    "SD2": {"tokenizer": f"{_SDXL}/tokenizer_2"},
    "SDXL": {"tokenizer": f"{_SDXL}/tokenizer", "tokenizer_2": f"{_SDXL}/tokenizer_2"},
}
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


def config_folder(path: Path) -> Path:
    """Where configs and tokenizers of a single file are looked for first."""
    return path.with_suffix(".config")


def open_single_file(path: Path) -> PipelineFiles:
    """The pipeline in a ``.safetensors`` or ``.ckpt`` file, none of whose values is read yet; says what was assumed.

    UserError if the file is damaged, or no Stable Diffusion 1.x, 2.x or SDXL base checkpoint, or its sizes are not
    those of a published model and nothing lies beside it.
    """
    arrays, metadata, beside = _index(path)
    kind = kind_of(path, arrays)
    folder = config_folder(path)
    files = {"index": INDEX, "scheduler": SCHEDULER} | {part: f"{part}/config.json" for part in LAYOUTS[kind]}
    given = {name: read_json(folder / file) for name, file in files.items() if (folder / file).is_file()}
    recorded = _prediction_type(path, kind, arrays, metadata, beside)
    configs = pipeline_configs(path, kind, arrays, recorded or "v_prediction", given)
    index, scheduler = configs.pop("index"), configs.pop("scheduler")
    if (index.get("_class_name") == XL) != (kind == "SDXL"):
        raise UserError(f"File {folder / INDEX} is not that of the model in {path}.")
    tokenizers: dict[str, str | Path] = {}
    for part in configs:
        if name := tokenizer_of(part):
            own, vocabulary = folder / name, configs[part].get("vocab_size")
            if not own.is_dir() and vocabulary != CLIP_VOCABULARY:
                raise UserError(
                    f"File {path} has a text encoder of {vocabulary} tokens, for which no tokenizer is known; put the "
                    f"tokenizer's files into {own}."
                )
            tokenizers[name] = own if own.is_dir() else TOKENIZERS[kind][name]
    if folder.is_dir():
        notice(f"Configs of {path} are those in {folder}, as far as it has them.")
    if recorded is None and "scheduler" not in given:
        notice(
            f"File {path} does not say what its UNet predicts; taken for v-prediction and 768 pixels, as diffusers "
            f"does. If it is a base model of 512 pixels, put its scheduler_config.json into {folder / 'scheduler'}."
        )
    if any(key.startswith("model_ema.") for key in arrays):
        notice(f"File {path} has averaged weights as well (model_ema.*); they are not read.")
    return PipelineFiles(
        path=path,
        index=index,
        configs=configs,
        scheduler=scheduler,
        tokenizers=tokenizers,
        in_file=lambda part, shapes: _find(path, kind, part, shapes, arrays),
    )


def tokenizers_of(path: Path) -> list[str]:
    """Names on the hub of the tokenizers that go with a single file, as far as they are not beside it."""
    return sorted({source for source in open_single_file(path).tokenizers.values() if isinstance(source, str)})


# ------------------------------------------------------------------------------------------------------------ pieces
def _index(path: Path) -> tuple[Arrays, dict[str, str], Json]:
    """Arrays by key, a safetensors file's metadata, and the values beside the state dict of a PyTorch file."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"File {path} cannot be read ({error.strerror}).") from error
    if is_zip or path.suffix in TORCH_SUFFIXES:
        arrays, beside = index_training_checkpoint(path)
        return arrays, {}, beside
    if path.suffix != ".safetensors":
        raise UserError(f"File {path} is no model: give a diffusers folder, or a .safetensors or .ckpt file.")
    weights = open_file(path)
    return weights.arrays, dict(weights.metadata), {}


def _find(path: Path, kind: str, part: str, shapes: PyTree, arrays: Arrays) -> Weights:
    """A part's arrays by their keys in diffusers and transformers, if the file has no keys that nothing here reads."""
    found, used = {}, set()
    _, prefix = LAYOUTS[kind][part]
    flat = flax.traverse_util.flatten_dict(shapes)
    for tree_path, original in originals(kind, part, shapes).items():
        ours, key = names.torch_shape(tree_path, flat[tree_path].shape), original.key
        if key not in arrays:  # some versions of transformers leave this level out
            key = key.replace(f"{prefix}text_model.", prefix)
        if key not in arrays:
            raise UserError(f"File {path} has no key {original.key!r}, which its other keys ask for; get it again.")
        stored, wanted = arrays[key], original.shape(ours)
        if stored.shape not in (wanted, wanted[:2] if original.convolution else wanted):
            raise UserError(f"File {path}: {key!r} has the shape {stored.shape} where {wanted} belongs; get it again.")
        used.add(key)
        found[names.torch_key(tree_path)] = original.view(stored, ours)
    others = tuple({other for _, other in LAYOUTS[kind].values()} - {prefix})
    left = [key for key in arrays if key not in used and not LEFT_OUT.fullmatch(key) and not key.startswith(others)]
    if left:
        listed = ", ".join(sorted(left)[:3]) + (", ..." if len(left) > 3 else "")
        raise UserError(
            f"File {path} has {len(left)} keys that are not known here ({listed}); it is refused, because leaving them "
            "out could change the model."
        )
    return Weights(path, found)


# ----------------------------------------------------------------------------------------------------------- configs
def pipeline_configs(
    path: Path, kind: str, arrays: Arrays, prediction_type: str, given: Mapping[str, Json] | None = None
) -> dict[str, Json]:
    """The configs of a pipeline in a single file, "index", "scheduler" and one for each part, as diffusers takes them.

    ``given`` are those that are known; ``prediction_type`` is what the UNet predicts, if the scheduler is not.
    UserError if a key that tells a size is missing, or the sizes do not tell the number of heads or groups.
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
    """The ``config.json`` of a part, in diffusers' or transformers' fields; errors as of ``pipeline_configs``."""
    sizes, config = _Sizes(path, arrays), _PUBLISHED[kind][part]
    if part == "unet":
        return config | _unet(sizes, kind)
    return config | (_vae(sizes) if part == "vae" else _text_encoder(sizes, *LAYOUTS[kind][part]))


def _prediction_type(path: Path, kind: str, arrays: Arrays, metadata: dict[str, str], beside: Json) -> str | None:
    """What the UNet predicts, by a safetensors file's header or the values ``beside`` a PyTorch file's ``state_dict``;
    None for an SD2.x that does not tell."""
    said = metadata.get("modelspec.prediction_type")
    if said is not None:
        if said not in _PREDICTION_TYPES:
            raise UserError(f"File {path}: its header says modelspec.prediction_type = {said!r}, not epsilon or v.")
        return _PREDICTION_TYPES[said]
    if V_PREDICTION in arrays:
        return "v_prediction"
    if kind != "SD2" or beside.get("global_step") == _SD2_BASE_STEPS:
        return "epsilon"
    return _ARCHITECTURES.get(metadata.get("modelspec.architecture", ""))


def model_spec(
    kind: str, title: str, prediction_type: str, image_size: tuple[int, int] | None, *, is_lora: bool = False
) -> dict[str, str]:
    """The header of a file after Stability AI's ModelSpec 1.0, by which programs tell and show what the file is: its
    ``kind``, "SD1", "SD2" or "SDXL", and ``image_size`` [height, width] of what the model was made for, if known."""
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
        header["modelspec.resolution"] = f"{image_size[1]}x{image_size[0]}"
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

    def width(self, key: str) -> int:
        """Channels of a convolution, which normalization divides into groups."""
        return _GROUPS * self.divided(self.of(key, 0), _GROUPS, "the number of groups of its normalization")

    def ndim(self, key: str) -> int:
        self.of(key, 0)
        return len(self._arrays[key].shape)

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self._arrays)

    def count(self, prefix: str) -> int:
        """Layers ``prefix0.``, ``prefix1.``, ..."""
        numbers = {key[len(prefix) :].partition(".")[0] for key in self._arrays if key.startswith(prefix)}
        return next(n for n in itertools.count() if str(n) not in numbers)

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
    widths = [sizes.width(f"{UNET}input_blocks.{first}.0.out_layers.3.weight") for first in firsts]
    depths = [sizes.count(f"{UNET}input_blocks.{first}.1.transformer_blocks.") for first in firsts]
    middle = sizes.count(f"{UNET}middle_block.1.transformer_blocks.")
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
    widths = [sizes.width(f"{VAE}encoder.down.{i}.block.0.conv2.weight") for i in range(max(1, num_levels))]
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
    if prefix == LAYOUTS["SD2"]["text_encoder"][1]:
        # SD2.x takes what the last but one layer of OpenCLIP ViT-H gives, so that 23 of its 24 layers are used.
        return config | {
            "num_hidden_layers": min(sizes.count(layers), published.CONFIGS["TEXT_SD21"]["num_hidden_layers"])
        }
    return config if whose == "clip" else config | {"projection_dim": sizes.of(f"{prefix}text_projection", 1)}
