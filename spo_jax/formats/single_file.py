"""A whole pipeline in one file, in the original layout of Stable Diffusion 1.x, 2.x and SDXL base.

Configs and tokenizers are not in such a file. They are those of the published pipelines, with sizes from the file; but
a folder beside it comes first, ``FILE.config`` for ``FILE.safetensors``, as far as it has a diffusers pipeline's files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax.numpy as jnp

from spo_jax.errors import UserError, notice
from spo_jax.formats import names, original_configs
from spo_jax.formats.original_layout import LAYOUTS, is_left_out, kind_of, originals
from spo_jax.formats.parts import check_parts, check_vae, mended_unet, scheduler_of
from spo_jax.formats.pipeline import Pipeline, read_json, replaced_parts
from spo_jax.formats.pipeline_files import PipelineFiles, is_xl, stem_of, tokenizer_names, with_parts, write_configs
from spo_jax.formats.safetensors_io import index_safetensors, read_metadata, write_params
from spo_jax.formats.stored import StoredArray
from spo_jax.formats.tokenizers import check_lengths, read_tokenizer
from spo_jax.formats.torch_bin import index_training_checkpoint
from spo_jax.formats.weights import TORCH_SUFFIXES, Placement, Weights, read_params

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


def open_single_file(path: Path, *, quiet: bool = True) -> PipelineFiles:
    """The pipeline in a ``.safetensors`` or ``.ckpt`` file, none of whose values is read yet.

    Args:
      path: the file.
      quiet: False says on stderr what was assumed.

    Raises:
      UserError: the file is damaged, or no Stable Diffusion 1.x, 2.x or SDXL base checkpoint, or its sizes are not
        those of a published model and nothing lies beside it.
    """
    arrays, metadata, beside = _index(path)
    kind = kind_of(path, arrays)
    folder = config_folder(path)

    def config(file: str, default: Any) -> dict[str, Any]:
        return read_json(folder / file) if (folder / file).is_file() else default()

    recorded = original_configs.recorded_prediction_type(path, kind, arrays, metadata, beside)
    scheduler = config(
        "scheduler/scheduler_config.json",
        lambda: original_configs.scheduler_config(kind, recorded or "v_prediction", arrays),
    )
    configs = {
        part: config(f"{part}/config.json", lambda part=part: original_configs.part_config(path, kind, part, arrays))
        for part in LAYOUTS[kind]
    }
    if not (folder / "unet" / "config.json").is_file():
        predicted = str(scheduler.get("prediction_type", "epsilon"))
        configs["unet"] = original_configs.with_latent_size(kind, configs["unet"], predicted)
    index = config("model_index.json", lambda: original_configs.index_config(kind))
    if is_xl(index) != (kind == "SDXL"):
        raise UserError(f"File {folder / 'model_index.json'} is not that of the model in {path}.")
    if not quiet:
        _say_what_was_assumed(path, arrays, recorded, (folder / "scheduler" / "scheduler_config.json").is_file())
    return PipelineFiles(
        path=path,
        index=index,
        configs=configs,
        scheduler=scheduler,
        tokenizers=_tokenizers(path, kind, configs),
        find=lambda part, shapes: _find(path, kind, part, shapes, arrays),
    )


def tokenizers_of(path: Path) -> list[str]:
    """Names on the hub of the tokenizers that go with a single file, as far as they are not beside it."""
    return sorted({source for source in open_single_file(path).tokenizers.values() if isinstance(source, str)})


def read_single_file(
    path: Path,
    dtype: Any,
    *,
    variant: str | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    sharding: Placement = None,
) -> Pipeline:
    """The pipeline in a single file; see ``read_pipeline`` for arguments.

    Raises:
      UserError: as in ``open_single_file``; a key is missing, left over or of another shape; there is no tokenizer.
    """
    replaced = replaced_parts(unet, vae, variant=variant)
    if variant and not replaced:
        raise UserError(f"File {path} has no variants; leave out --variant or config.variant ({variant!r}).")
    own = open_single_file(path, quiet=False)
    files, xl = with_parts(own, replaced, variant), is_xl(own.index)
    models = {part: files.module(part, dtype) for part in files.configs}
    if "vae" in replaced:
        check_vae(path, own.module("vae", dtype), replaced["vae"], models["vae"])
    check_parts(path, models, {part: replaced.get(part, path) for part in models})
    if not xl:
        models["unet"] = mended_unet(models["unet"], files.configs["unet"], replaced.get("unet", path))
    scheduler_config = scheduler_of(files.scheduler, path, sdxl=xl)
    tokenizers = {}
    for part in models:
        if part.startswith("text_encoder"):
            (name,) = tokenizer_names([part])
            tokenizers[name] = read_tokenizer(files.tokenizers[name], models[part].tower)
    check_lengths(tokenizers)
    shapes = {part: files.shapes(part, dtype) for part in models}
    weights = {part: files.find(part, shapes[part]) for part in models}  # all keys are checked before one is read
    params = {}
    for part in models:
        below = _below(sharding, part) if callable(sharding) else sharding
        params[part] = read_params(weights[part], shapes[part], sharding=below)
    return Pipeline(
        folder=path,
        scheduler_config=scheduler_config,
        params=params,
        force_zeros_for_empty_prompt=xl and bool(files.index.get("force_zeros_for_empty_prompt", True)),
        replaced=replaced,
        variant=variant,
        **models,
        **tokenizers,
    )


@contextlib.contextmanager
def unpacked(path: Path, near: Path, *, without: Collection[str]) -> Iterator[Path]:
    """A diffusers folder of the pipeline in a single file, while the ``with`` runs.

    Args:
      path: the single file.
      near: the folder is made beside this path, and goes afterwards.
      without: parts whose weights are not needed.
    """
    files = open_single_file(path)
    folder = near.with_name(f"{near.name}.{os.getpid()}.parts.tmp")
    try:
        write_configs(files, folder)
        for part in files.configs:
            if part not in without:
                dtype = next(iter(files.find(part, files.shapes(part, jnp.float32)).arrays.values())).dtype
                out = folder / part / f"{stem_of(part)}.safetensors"
                write_params(out, files.read(part, dtype), dtype=dtype)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ pieces
def _index(path: Path) -> tuple[dict[str, StoredArray], dict[str, str], dict[str, Any]]:
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


def _tokenizers(path: Path, kind: str, configs: dict[str, dict[str, Any]]) -> dict[str, str | Path]:
    found: dict[str, str | Path] = {}
    for part in configs:
        if part not in ("unet", "vae"):
            (name,) = tokenizer_names([part])
            beside, vocabulary = config_folder(path) / name, configs[part].get("vocab_size")
            if not beside.is_dir() and vocabulary != CLIP_VOCABULARY:
                raise UserError(
                    f"File {path} has a text encoder of {vocabulary} tokens, for which no tokenizer is known; put the "
                    f"tokenizer's files into {beside}."
                )
            found[name] = beside if beside.is_dir() else TOKENIZERS[kind][name]
    return found


def _find(path: Path, kind: str, part: str, shapes: Any, arrays: dict[str, StoredArray]) -> Weights:
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
    whole = {prefix for _, prefix in LAYOUTS[kind].values()}
    left = [
        key
        for key in arrays
        if key not in used and not is_left_out(key) and (key.startswith(prefix) or not key.startswith(tuple(whole)))
    ]
    if left:
        listed = ", ".join(sorted(left)[:3]) + (", ..." if len(left) > 3 else "")
        raise UserError(
            f"File {path} has {len(left)} keys that are not known here ({listed}); it is refused, because leaving them "
            "out could change the model."
        )
    return Weights(path, found)


def _below(sharding: Any, part: str) -> Any:
    return lambda tree_path, shape: sharding((part, *tree_path), shape)


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
