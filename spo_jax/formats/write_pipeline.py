"""A diffusers pipeline folder with another UNet, also with other text encoders, complete or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError, notice
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.networks import PARTS
from spo_jax.formats.pipeline_files import INDEX, write_configs
from spo_jax.formats.safetensors_io import write_params
from spo_jax.formats.single_file import open_single_file
from spo_jax.formats.weights import (
    DIFFUSERS_STEM,
    TORCH_SUFFIXES,
    TRANSFORMERS_STEM,
    choose_variant,
    find_weights,
    read_weight_map,
)

# Parts that a pipeline may do without; diffusers then wants null in their place.
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_WEIGHT_SUFFIXES = (".safetensors", *TORCH_SUFFIXES, ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf")


def check_output_folder(out: str | Path) -> None:
    """Raises UserError if there is something at ``out`` already."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not an empty folder; choose another name.")


def write_pipeline(
    out: str | Path,
    source: str | Path,
    unet_params: PyTree,
    *,
    text_encoders: Mapping[str, PyTree] | None = None,
    replaced: Mapping[str, Path] | None = None,
    variant: str | None = None,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes the pipeline of ``source`` with the given parameters; everything else is copied.

    Copied is what ``model_index.json`` names: of each part its weights in one form, whose names have no variant, and no
    weight file of the replaced models. A component that the installed diffusers or transformers does not have is named
    in a warning: that version cannot load the folder.

    Args:
      out: the new folder; it may exist if it is empty.
      source: a diffusers pipeline folder, or a single file, whose other parts are written in the dtype that they have.
      unet_params: for the UNet's ``config.json``.
      text_encoders: parameters of those that are replaced as well, by name.
      replaced: folders of parts that are not those of ``source`` (see ``Pipeline``).
      variant: of the weights that are copied.
      dtype: of the written models.

    Raises:
      UserError: ``out`` is not empty or cannot be written, or ``source`` is not complete.
    """
    out, source, replaced = Path(out).absolute(), Path(source), replaced or {}
    check_output_folder(out)
    models = {"unet": unet_params, **(text_encoders or {})}
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        if source.is_file():
            index = _unpack(source, temporary, replaced, variant, without=models)
        else:
            index = _copy_parts(source, temporary, replaced, variant, without=models)
        libraries = {name: part[0] for name, part in index.items() if isinstance(part, list) and part and part[0]}
        for name, library in libraries.items():
            if library != "diffusers":
                _compute_in_float32(temporary / name / "config.json")
        for name, params in models.items():
            write_params(temporary / name / f"{_stem(libraries[name])}.safetensors", params, dtype=dtype)
        os.replace(temporary, out)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error.strerror or error}); choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for unknown in _unknown_classes(index):
        notice(f"warning: {out / INDEX} names {unknown}, which cannot load it.")


def _unpack(
    source: Path, out: Path, replaced: Mapping[str, Path], variant: str | None, *, without: Collection[str]
) -> Json:
    """Writes the pipeline in a single file as a folder, but no weights of the parts ``without``; returns its index."""
    files = dataclasses.replace(open_single_file(source), variant=variant).with_parts(replaced)
    write_configs(files, out)
    for part in files.configs:
        if part not in without:
            shapes = files.network(part, np.float32)[1]
            dtype = next(iter(files.weights(part, shapes).arrays.values())).dtype
            write_params(out / part / f"{PARTS[part].stem}.safetensors", files.read(part, dtype), dtype=dtype)
    return read_json(out / INDEX)


def _copy_parts(
    source: Path, out: Path, replaced: Mapping[str, Path], variant: str | None, *, without: Collection[str]
) -> Json:
    """Copies what the index of a folder names, but no weights of the parts ``without``; returns the new index."""
    index = read_json(source / INDEX)
    parts = {name: part for name, part in index.items() if isinstance(part, list)}  # the others are settings
    if outside := [name for name in parts if Path(name).name != name or name == ".."]:
        raise UserError(f"File {source / INDEX} names {outside[0]!r}, which is no folder of the pipeline's.")
    for name, part in parts.items():
        folder = replaced.get(name, source / name)
        if folder.is_dir():
            files = _files_of(folder, part[0], variant, weights=name not in without)
            if name in replaced:  # such a folder may hold other files of the user's
                files = {path: to for path, to in files.items() if _holds_weights(path) or to == "config.json"}
            _copy(files, out / name)
        elif name in _OPTIONAL:
            index[name] = [None, None]
        elif part[:1] != [None]:
            raise UserError(f"Folder {folder} does not exist, but {source / INDEX} names it.")
    if index.get("safety_checker") == [None, None]:
        index["requires_safety_checker"] = False
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


def _files_of(source: Path, library: str | None, variant: str | None, *, weights: bool) -> dict[Path, str]:
    """What is copied of a part, with the names that it gets: small files, and weights in the form that is read here."""
    stem, every = _stem(library), sorted(path for path in source.rglob("*") if path.is_file())
    files = {path: path.relative_to(source).as_posix() for path in every if not _holds_weights(path)}
    if not weights or len(files) == len(every):
        return files
    found = next((v for v in (variant, choose_variant(source, stem, None)) if find_weights(source, stem, v)), None)
    index = find_weights(source, stem, found)
    if index is None:
        raise UserError(f"Folder {source} has no weights that could be meant among {', '.join(p.name for p in every)}.")
    chosen = [index]
    if index.suffix == ".json":
        chosen += sorted({source / name for name in read_weight_map(index).values()})
    return files | {path: path.name.replace(f".{found}" if found else "", "", 1) for path in chosen}


def _copy(files: Mapping[Path, str], out: Path) -> None:
    """Copies contents alone: modes follow the umask, and links, as in the hub's cache, become files."""
    out.mkdir()
    for path, name in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
        if ".index" in name and path.name != name:  # it names the shards, which have new names too
            index = json.loads(path.read_text(encoding="utf-8"))
            index["weight_map"] = {key: files[path.parent / shard] for key, shard in index["weight_map"].items()}
            (out / name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _compute_in_float32(config: Path) -> None:
    # Without a word there, or with "float16", transformers loads what diffusers' float32 parts do not go with.
    fields = read_json(config) if config.is_file() else {}
    if {"dtype", "torch_dtype", "model_type"} & fields.keys():
        fields = {key: value for key, value in fields.items() if key != "dtype"} | {"torch_dtype": "float32"}
        config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _stem(library: str | None) -> str:
    return DIFFUSERS_STEM if library == "diffusers" else TRANSFORMERS_STEM


def _holds_weights(path: Path) -> bool:
    return path.suffix in _WEIGHT_SUFFIXES or ".index" in path.name


def _unknown_classes(index: Json) -> list[str]:
    """Classes of the pipeline and its parts that the installed libraries do not have, each with the library."""
    import diffusers  # these take seconds to import, and only what is written needs them
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = [part for part in index.values() if isinstance(part, list) and len(part) == 2]
    named = [("diffusers", index.get("_class_name")), *parts]
    return [
        f"{name}.{kind}, unknown to {name} {libraries[name].__version__}"
        for name, kind in named
        if name in libraries and kind not in dir(libraries[name])
    ]
