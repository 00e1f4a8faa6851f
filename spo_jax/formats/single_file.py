"""A whole pipeline in one file, in the original layout of Stable Diffusion 1.x, 2.x and SDXL base.

Configs and tokenizers are not in such a file. They are those of the published pipelines, with sizes from the file; but
a folder beside it comes first, ``FILE.config`` for ``FILE.safetensors``, as far as it has a diffusers pipeline's files.
"""

from __future__ import annotations

from pathlib import Path

import flax.traverse_util
from jaxtyping import PyTree

from spo_jax.errors import UserError, notice
from spo_jax.formats import names, original_configs
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.original_layout import LAYOUTS, LEFT_OUT, kind_of, originals
from spo_jax.formats.pipeline_files import INDEX, SCHEDULER, PipelineFiles, is_xl, tokenizer_of
from spo_jax.formats.safetensors_io import index_safetensors, read_metadata
from spo_jax.formats.stored import StoredArray
from spo_jax.formats.torch_bin import index_training_checkpoint
from spo_jax.formats.weights import TORCH_SUFFIXES, Weights

CLIP_VOCABULARY = 49_408
_SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5@451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
_SDXL = "stabilityai/stable-diffusion-xl-base-1.0@462165984030d82259a11f4367a4eed129e94a7b"
# SD2.x's tokenizer is SDXL's second one: CLIP's vocabulary, padded with 0 as open_clip does.
TOKENIZERS = {
    "SD1": {"tokenizer": f"{_SD15}/tokenizer"},
    "SD2": {"tokenizer": f"{_SDXL}/tokenizer_2"},
    "SDXL": {"tokenizer": f"{_SDXL}/tokenizer", "tokenizer_2": f"{_SDXL}/tokenizer_2"},
}


def config_folder(path: Path) -> Path:
    """Where configs and tokenizers of a single file are looked for first."""
    return path.with_suffix(".config")


def open_single_file(path: Path) -> PipelineFiles:
    """The pipeline in a ``.safetensors`` or ``.ckpt`` file, none of whose values is read yet; says what was assumed.

    Raises:
      UserError: the file is damaged, or no Stable Diffusion 1.x, 2.x or SDXL base checkpoint, or its sizes are not
        those of a published model and nothing lies beside it.
    """
    arrays, metadata, beside = _index(path)
    kind = kind_of(path, arrays)
    folder = config_folder(path)
    files = {"index": INDEX, "scheduler": SCHEDULER} | {part: f"{part}/config.json" for part in LAYOUTS[kind]}
    given = {name: read_json(folder / file) for name, file in files.items() if (folder / file).is_file()}
    recorded = original_configs.recorded_prediction_type(path, kind, arrays, metadata, beside)
    configs = original_configs.pipeline_configs(path, kind, arrays, recorded or "v_prediction", given)
    index, scheduler = configs.pop("index"), configs.pop("scheduler")
    if is_xl(index) != (kind == "SDXL"):
        raise UserError(f"File {folder / INDEX} is not that of the model in {path}.")
    _say_what_was_assumed(path, arrays, recorded, "scheduler" in given)
    return PipelineFiles(
        path=path,
        index=index,
        configs=configs,
        scheduler=scheduler,
        tokenizers=_tokenizers(path, kind, configs),
        in_file=lambda part, shapes: _find(path, kind, part, shapes, arrays),
    )


def tokenizers_of(path: Path) -> list[str]:
    """Names on the hub of the tokenizers that go with a single file, as far as they are not beside it."""
    return sorted({source for source in open_single_file(path).tokenizers.values() if isinstance(source, str)})


# ------------------------------------------------------------------------------------------------------------ pieces
def _index(path: Path) -> tuple[dict[str, StoredArray], dict[str, str], Json]:
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
    return index_safetensors(path), read_metadata(path), {}


def _tokenizers(path: Path, kind: str, configs: dict[str, Json]) -> dict[str, str | Path]:
    found: dict[str, str | Path] = {}
    for part, config in configs.items():
        if name := tokenizer_of(part):
            beside, vocabulary = config_folder(path) / name, config.get("vocab_size")
            if not beside.is_dir() and vocabulary != CLIP_VOCABULARY:
                raise UserError(
                    f"File {path} has a text encoder of {vocabulary} tokens, for which no tokenizer is known; put the "
                    f"tokenizer's files into {beside}."
                )
            found[name] = beside if beside.is_dir() else TOKENIZERS[kind][name]
    return found


def _find(path: Path, kind: str, part: str, shapes: PyTree, arrays: dict[str, StoredArray]) -> Weights:
    """A part's arrays by their keys in diffusers and transformers.

    Raises:
      UserError: one is missing or of another shape, or the file has keys that nothing here reads.
    """
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


def _say_what_was_assumed(path: Path, arrays: dict[str, StoredArray], recorded: str | None, given: bool) -> None:
    folder = config_folder(path)
    if folder.is_dir():
        notice(f"Configs of {path} are those in {folder}, as far as it has them.")
    if recorded is None and not given:
        notice(
            f"File {path} does not say what its UNet predicts; taken for v-prediction and 768 pixels, as diffusers "
            f"does. If it is a base model of 512 pixels, put its scheduler_config.json into {folder / 'scheduler'}."
        )
    if any(key.startswith("model_ema.") for key in arrays):
        notice(f"File {path} has averaged weights as well (model_ema.*); they are not read.")
