"""Weights of one model, in whichever of the usual files they come, read one parameter at a time."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PyTree

from spo_jax.errors import UserError, notice
from spo_jax.formats import names
from spo_jax.formats.hub import missing
from spo_jax.formats.json_files import read_json
from spo_jax.formats.safetensors_io import index_safetensors, read_metadata
from spo_jax.formats.stored import StoredArray, empty
from spo_jax.formats.torch_bin import index_torch_bin

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
# transformers names its two formats differently.
_BIN_STEMS = {TRANSFORMERS_STEM: "pytorch_model"}
# PyTorch's files are zip archives; those of before 1.6 are told by their names, to be refused as such.
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_ZIP = b"PK\x03\x04"
# The bits of an exponent, which are all 1 in infinities and NaNs.
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float32": (np.uint32, 0x7F800000),
}
_BLOCK = 2**20  # numbers looked at at a time
# Buffers that old checkpoints carry and that hold no information.
_IGNORED_SUFFIXES = (".position_ids",)

# Where parameters go: all of them the same way, or each by its path in the model's tree and its shape.
Placement = Sharding | Callable[[tuple[str, ...], tuple[int, ...]], Sharding] | None


@dataclasses.dataclass(frozen=True)
class Weights:
    """The arrays of one model by checkpoint key, still in their files; ``path`` is what messages name."""

    path: Path
    arrays: dict[str, StoredArray]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of a safetensors file


def open_file(path: Path) -> Weights:
    """The weights in one file, of safetensors or of PyTorch; UserError if it is missing or damaged."""
    if is_torch_file(path):
        return Weights(path, index_torch_bin(path))
    return Weights(path, index_safetensors(path), read_metadata(path))


def is_torch_file(path: Path) -> bool:
    """Whether a weight file is PyTorch's and not safetensors; UserError if it is missing."""
    if not path.is_file():
        raise UserError(missing(path, "Weight file"))
    with path.open("rb") as file:
        start = file.read(9)
    # The content decides, and the name where it does not: safetensors begin with the length of a JSON text.
    return start.startswith(_ZIP) or (path.suffix in TORCH_SUFFIXES and start[8:] != b"{")


def open_weights(folder: Path, stem: str, variant: str | None = None) -> Weights:
    """The weights of the model in ``folder``: safetensors before PyTorch files, one file before shards.

    ``stem``, ``DIFFUSERS_STEM`` or ``TRANSFORMERS_STEM``, begins the file names, and ``variant`` stands between it and
    the suffix, as in ``model.fp16.safetensors``. None takes files without one, or else the only variant there is, with
    a notice. UserError if there is none of these files, or one of them, or a shard, is damaged or missing.
    """
    chosen = choose_variant(folder, stem, variant)
    if chosen != variant:
        notice(f"{folder}: only {chosen} weights are there, so these are read.")
    path = find_weights(folder, stem, chosen)
    if path is None:
        file = f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".pt"))
        hint = f" It has {', '.join(others[:3])}; if one is meant, name its variant (--variant, config.variant)."
        if any(re.search(r"-\d+-of-\d+\.", other) for other in others):
            hint = f" It has shards ({', '.join(others[:3])}), but not their index, {file}.index.json; copy it as well."
        raise UserError(missing(folder / file, "Weight file") + (hint if others else ""))
    if path.suffix != ".json":
        return open_file(path)
    weight_map = read_weight_map(path)
    opened = {shard: open_file(folder / shard).arrays for shard in sorted(set(weight_map.values()))}
    for key, shard in weight_map.items():
        if key not in opened[shard]:
            raise UserError(f"Weight file {folder / shard} has no key {key!r}, which {path.name} puts there.")
    # Keys that only the shards know are kept, so that the reader refuses them as it does in a single file.
    every = {key: array for arrays in opened.values() for key, array in arrays.items()}
    return Weights(path, every | {key: opened[shard][key] for key, shard in weight_map.items()})


def find_weights(folder: Path, stem: str, variant: str | None) -> Path | None:
    """The file, or the index of the shards, that ``open_weights`` reads; None if there is none of this variant."""
    dot = f".{variant}" if variant else ""
    for name in (f"{stem}.safetensors", f"{_BIN_STEMS.get(stem, stem)}.bin"):
        plain, suffix = name.rsplit(".", 1)
        single = folder / f"{plain}{dot}.{suffix}"
        # The variant stands before the last suffix, or, in files of newer programs, before the first.
        for path in (single, folder / f"{name}.index{dot}.json", folder / f"{plain}{dot}.{suffix}.index.json"):
            if path.is_file():
                return path
    return None


def weight_files(path: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The files that ``open_weights`` reads of the folder ``path``, or the file itself; all that are there of them."""
    if path.is_file():
        return [path]
    found = find_weights(path, stem, choose_variant(path, stem, variant))
    if found is None or found.suffix != ".json":
        return [found] if found else []
    return [path / shard for shard in sorted(set(read_weight_map(found).values()))]


def choose_variant(folder: Path, stem: str, variant: str | None) -> str | None:
    """The variant asked for; or, where None was, and there is nothing without one, the only variant that is there."""
    if variant or find_weights(folder, stem, None) is not None or not folder.is_dir():
        return variant
    stems = "|".join({stem, _BIN_STEMS.get(stem, stem)})
    one = re.compile(
        rf"(?:{stems})(?:\.([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?"
        r"|\.(?:safetensors|bin)\.index\.([^.]+)\.json)"
    )
    matches = [one.fullmatch(path.name) for path in folder.iterdir()]
    names = {match[1] or match[2] for match in matches if match}
    found = [name for name in names if find_weights(folder, stem, name) is not None]
    return found[0] if len(found) == 1 else None


def read_weight_map(index: Path) -> dict[str, str]:
    """The ``weight_map`` of an ``*.index.json``: the file of its folder that has each key."""
    try:
        weight_map = read_json(index)["weight_map"]
        inside = all(Path(file).name == file and file != ".." and "\\" not in file for file in weight_map.values())
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"File {index} is no index of weights ({error}); download or copy it again.") from error
    if not inside:
        raise UserError(f"File {index} names weight files outside its folder; get the model from its source again.")
    return weight_map


def read_params(source: Path | Weights, shapes: PyTree, *, prefix: str = "", sharding: Placement = None) -> PyTree:
    """Reads one model's parameters: every key is used exactly once and every shape agrees.

    Parameters are read, brought to our layout and dtype, and put on their devices one at a time, so that the host needs
    room for one of them only.

    Args:
      source: a weight file, or what ``open_weights`` gave, in PyTorch naming and layout.
      shapes: tree of ``jax.ShapeDtypeStruct``; the result has its structure and dtypes.
      prefix: what every key of the file starts with (the released preference models use ``"model."``).
      sharding: where the parameters go; None is JAX's default device.

    Raises:
      UserError: a missing, left-over or wrongly shaped key (before anything is read), or numbers that are not finite.
    """
    weights = source if isinstance(source, Weights) else open_file(source)
    left = {k: v for k, v in weights.arrays.items() if not k.endswith(_IGNORED_SUFFIXES)}
    found = {}
    flat = flax.traverse_util.flatten_dict(shapes)
    for tree_path, leaf in flat.items():
        key = prefix + names.torch_key(tree_path)
        key = next((k for k in (key, *names.other_keys(key)) if k in left), key)
        if key not in left:
            raise UserError(
                f"Weight file {weights.path} has no key {key!r}, which its config.json asks for; "
                "the file and the config do not belong together."
            )
        stored = left.pop(key)
        found[tree_path] = key, stored
        expected = names.torch_shape(tree_path, leaf.shape)
        if expected not in (stored.shape, (*stored.shape, 1, 1)):
            raise UserError(
                f"Weight file {weights.path}: {key!r} has shape {stored.shape}, but its config.json asks for "
                f"{expected}."
            )
        if stored.dtype.kind in "iub":
            raise UserError(
                f"Weight file {weights.path}: {key!r} holds {stored.dtype} numbers; quantised models are not "
                "supported, get the model in float16, bfloat16 or float32."
            )
    if left:
        listed = ", ".join(sorted(left)[:3])
        raise UserError(
            f"Weight file {weights.path} has {len(left)} keys that the model in config.json does not use ({listed}"
            f"{', ...' if len(left) > 3 else ''}); the file and the config do not belong together."
        )
    placed = {}
    # The largest first: the copies that its conversion takes then come on top of nothing.
    for tree_path in sorted(flat, key=lambda p: -int(np.prod(flat[p].shape))):
        leaf, (key, stored) = flat[tree_path], found[tree_path]
        array = names.from_torch(tree_path, stored.read().reshape(names.torch_shape(tree_path, leaf.shape)))
        if array.dtype != leaf.dtype or not array.flags.c_contiguous:
            converted = empty(leaf.shape, leaf.dtype)
            np.copyto(converted, array, casting="unsafe")
            array = converted
        if not is_finite(array):
            raise UserError(
                f"Weight file {weights.path}: {key!r} has numbers that are not finite (NaN or infinity); "
                "the model was saved damaged, or is damaged now: get it again."
            )
        where = sharding(tree_path, leaf.shape) if callable(sharding) else sharding
        if where is None:
            value = jax.device_put(array)
        else:  # unlike device_put, this also works where other processes hold some of the devices
            value = jax.make_array_from_callback(array.shape, where, array.__getitem__)
        placed[tree_path] = value.block_until_ready()  # the host's copy can go
    return flax.traverse_util.unflatten_dict({tree_path: placed[tree_path] for tree_path in flat})


def is_finite(array: np.ndarray) -> bool:
    """Whether all of an array of floats, in row-major order, is finite: by the exponents, as numpy's own is slow."""
    integer, exponent = _EXPONENTS[str(array.dtype)]
    blocks = np.array_split(array.reshape(-1).view(integer), -(-array.size // _BLOCK) or 1)
    return not any(((block & exponent) == exponent).any() for block in blocks)
