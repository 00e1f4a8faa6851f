"""Reading LoRA files of others: diffusers, peft, the kohya trainer, OneTrainer; in safetensors or PyTorch's files.

Every layout is read as ``{"unet": tree, "text_encoder": tree, "text_encoder_2": tree}``, without the parts that the
file does not adapt. A tree holds float32 adapters, see ``models/lora.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from spo_jax.distributed.processes import is_main_process
from spo_jax.errors import UserError, notice
from spo_jax.formats import lora_keys
from spo_jax.formats.hub import fetched, with_strength
from spo_jax.formats.lora_config import CONFIG_FILE, PeftConfig, read_configs
from spo_jax.formats.lora_keys import Layer
from spo_jax.formats.stored import StoredArray
from spo_jax.formats.weights import TORCH_SUFFIXES, open_file
from spo_jax.models.lora import TARGETS, init_lora

FILE_NAME = "pytorch_lora_weights.safetensors"
# In the order in which a folder is searched.
_FILE_NAMES = (FILE_NAME, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
_FAMILIES = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}  # by the width of their text embeddings


@dataclasses.dataclass(frozen=True)
class _File:
    """A LoRA file whose values are still in it; ``configs`` are peft's, by part, and ``strength`` is the user's."""

    path: Path
    arrays: dict[str, StoredArray]
    configs: dict[str, PeftConfig]
    strength: float = 1.0


def read_lora(path: str | Path, shapes: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Reads adapters in any layout of ``lora_keys``; the scale, alpha / rank, is folded into ``B``.

    Args:
      path: the file, or the folder that holds it; local, or on the hub (see ``resolve_model``).
      shapes: trees of parameters or their shapes by part, at least ``"unet"``; other entries are not looked at.

    Raises:
      UserError: the file is missing or damaged; a key or shape does not fit the pipeline; it holds another kind of
        adapters, or numbers that are not finite.
    """
    return _parts(_open(path), shapes)


def read_adapters(lora_names: Iterable[str], shapes: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The sum of several adapters, each by its name and strength (see ``hub.with_strength``), as ``read_lora``.

    The sum of two low-rank matrices is one of both ranks together: ``[A1, A2] [s1 B1; s2 B2]``.
    """
    layers: dict[tuple[str, ...], list[jax.Array]] = {}
    for lora_name in lora_names:
        for path, value in flax.traverse_util.flatten_dict(_parts(_named(lora_name), shapes)).items():
            layers.setdefault(path, []).append(value)
    return flax.traverse_util.unflatten_dict(
        {path: jnp.concatenate(values, axis=-1 if path[-1] == "A" else 0) for path, values in layers.items()}
    )


def check_lora_files(lora_names: Iterable[str]) -> None:
    """Refuses names, strengths and files that no model can use, before a model is read; of the files headers are read.

    Raises:
      UserError: as ``read_lora``, of what can be told without a model and without the values.
    """
    for lora_name in lora_names:
        _named(lora_name)


def starting_lora(key: jax.Array, params: PyTree, rank: int, lora_name: str | None) -> PyTree:
    """Adapters of the UNet to start training from: those of a file, and fresh ones where it has none.

    The file's layers keep their ranks, and all of them are trained, also those that would get no fresh adapters; a
    notice tells what differs from the config.

    Args:
      key: PRNG key of the fresh ones.
      params: UNet parameters (only names and shapes are read).
      rank: of the fresh ones.
      lora_name: a file or a folder with one, also with a strength; None for fresh adapters everywhere.

    Raises:
      UserError: as ``read_lora``, or the file adapts a text encoder, which is not trained.
    """
    lora = flax.traverse_util.flatten_dict(init_lora(key, params, rank))
    if lora_name is None:
        return flax.traverse_util.unflatten_dict(lora)
    file = _named(lora_name)
    text_key = next((k for k in sorted(file.arrays) if lora_keys.text_encoder_of(k)), None)
    if text_key is not None:
        raise UserError(
            f"LoRA file {file.path} adapts the text encoder too ({text_key!r}), and training adapts the UNet only; "
            "merge the file into the model with spo_jax.export --format=pipeline, and train on that model."
        )
    read = flax.traverse_util.flatten_dict(_parts(file, {lora_keys.UNET: params})[lora_keys.UNET])
    _say_what_differs(file.path, read, rank)
    return flax.traverse_util.unflatten_dict(lora | read)


def _say_what_differs(path: Path, read: Mapping[tuple[str, ...], jax.Array], rank: int) -> None:
    """One line about what differs between adapters to start from and those that the config would make."""
    ranks = sorted({x.shape[-1] for p, x in read.items() if p[-1] == "A"})
    more = sum(p[-1] == "A" and p[-2] not in TARGETS for p in read)
    said = []
    if ranks != [rank]:
        said.append(f"its layers keep rank {' and '.join(map(str, ranks))}, where config.lora.rank is {rank}")
    if more:
        said.append(f"{more} layers beyond the attention projections are trained as well")
    if said and is_main_process():
        notice(f"training starts from LoRA file {path}: {'; '.join(said)}.")


# ----------------------------------------------------------------------------------------------------------- the file
def _named(lora_name: str) -> _File:
    """The file that a name of adapters with a strength stands for, see ``_open``."""
    name, strength = with_strength(lora_name)
    return dataclasses.replace(_open(name), strength=strength)


def _open(path: str | Path) -> _File:
    """The file that a name of adapters stands for, without its values; refuses other kinds of adapters."""
    path = fetched(path)
    folders = {part: path / part for part in lora_keys.PARTS if (path / part / CONFIG_FILE).is_file()}
    if folders and not any((path / name).is_file() for name in _FILE_NAMES):
        # As peft's own examples save a UNet and its text encoder: a folder for each, whose keys do not name it.
        files = {part: _open(folder) for part, folder in folders.items()}
        arrays = {f"{part}.{key}": array for part, file in files.items() for key, array in file.arrays.items()}
        configs = {part: file.configs[part] for part, file in files.items() if part in file.configs}
        return _File(path, arrays, configs)
    path = _file_in(path) if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"LoRA file {path} does not exist; give a LoRA file, or the --workdir of a training run.")
    arrays = open_file(path).arrays
    if not arrays:
        raise UserError(f"LoRA file {path} is empty; it was not saved properly.")
    if (other := lora_keys.other_kind(arrays)) is not None:
        raise UserError(
            f"LoRA file {path} holds {other[1]} ({other[0]!r}), which is not supported; only plain LoRA of linear and "
            "convolution layers is: train or convert it to that."
        )
    return _File(path, arrays, read_configs(path))


def _file_in(folder: Path) -> Path:
    """The LoRA file of a folder: of the usual name, or the only weight file there is."""
    for name in _FILE_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", *TORCH_SUFFIXES) and p.is_file())
    if len(found) == 1:
        return found[0]
    listed = f"; it has {', '.join(p.name for p in found[:3])}: name one of them" if found else ""
    raise UserError(f"Folder {folder} has no {' or '.join(_FILE_NAMES)}{listed or '; is it the right folder?'}")


# ---------------------------------------------------------------------------------------------------------- its layers
def _parts(file: _File, shapes: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The adapters in a file, each at its layer of a pipeline with such parameters."""
    _check_family(file, shapes)
    spellings = lora_keys.spellings(shapes)
    found: dict[Layer, dict[str, str]] = {}
    left = []
    for key in file.arrays:
        parsed = lora_keys.parse_key(key)
        layer = None if parsed is None else spellings.get(parsed.module)
        if parsed is None or layer is None:
            left.append(key)
            continue
        other = found.setdefault(layer, {}).setdefault(parsed.role, key)
        if other != key:
            raise UserError(
                f"LoRA file {file.path} has both {other!r} and {key!r} for one layer; save each of its adapters in a "
                "file of its own."
            )
    if left:
        _refuse_left_over(file, left, shapes)
    kernels = {part: flax.traverse_util.flatten_dict(shapes[part]) for part in lora_keys.PARTS if part in shapes}
    lora = {}
    for layer, keys in found.items():
        kernel = tuple(kernels[layer.part][(*layer.path, "kernel")].shape)
        lora[(layer.part, *layer.path, "A")], lora[(layer.part, *layer.path, "B")] = _matrices(
            file, layer, keys, kernel
        )
    return flax.traverse_util.unflatten_dict(lora)


def _matrices(
    file: _File, layer: Layer, keys: Mapping[str, str], kernel: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """``A`` and ``B`` of a layer whose kernel has the shape ``kernel``, [in, out] or [h, w, in, out]."""
    for role, missing in (("down", "up"), ("up", "down")):
        if missing not in keys:
            key = keys.get(role)
            alone = f"{keys.get('alpha')!r} without its matrices"
            other = alone if key is None else f"{key!r}, but not {lora_keys.counterpart(key)!r}"
            raise UserError(f"LoRA file {file.path} has {other}; the file is incomplete.")
    down, up = file.arrays[keys["down"]], file.arrays[keys["up"]]
    for key, array in ((keys["down"], down), (keys["up"], up)):
        if array.dtype.kind in "iub":
            raise UserError(
                f"LoRA file {file.path}: {key!r} holds {array.dtype} numbers; quantised adapters are not supported, "
                "get them as float16 or float32."
            )
    *window, fan_in, fan_out = kernel
    rank = down.shape[0] if len(down.shape) in (2, 4) else 0
    # Kernels of 1x1 are kept as those of linear layers by some, and the other way round.
    downs = [(rank, fan_in, *window)] if math.prod(window) > 1 else [(rank, fan_in), (rank, fan_in, 1, 1)]
    if not rank or down.shape not in downs or up.shape not in ((fan_out, rank), (fan_out, rank, 1, 1)):
        expected = f"[rank, {', '.join(map(str, downs[0][1:]))}] and [{fan_out}, rank]"
        raise UserError(
            f"LoRA file {file.path}: {keys['down']!r} and {keys['up']!r} have shapes {list(down.shape)} and "
            f"{list(up.shape)}, which do not fit the model's {expected}; it was made for another model."
        )
    a = _read(file, keys["down"]).reshape(rank, fan_in, *window).T
    a = a.swapaxes(0, 1) if window else a  # [w, h, in, rank] before
    b = _read(file, keys["up"]).reshape(fan_out, rank).T
    scale = 1.0
    if "alpha" in keys:
        alpha = file.arrays[keys["alpha"]]
        if math.prod(alpha.shape) != 1:
            raise UserError(f"LoRA file {file.path}: {keys['alpha']!r} has shape {alpha.shape}, not a single number.")
        scale = float(_read(file, keys["alpha"]).reshape(())) / rank
    elif layer.part in file.configs:
        scale = file.configs[layer.part].scale(lora_keys.module_name(layer.path), rank)
    with np.errstate(over="ignore", invalid="ignore"):
        b = b * np.float32(scale)
        largest = np.abs(a).max() * np.abs(b).max() * np.float32(rank)
    if not np.isfinite(largest):
        raise UserError(
            f"LoRA file {file.path}: {keys['down']!r} and {keys['up']!r} with their scale {scale:g} make weights that "
            "are not finite in float32; the file is damaged: use another one."
        )
    return jnp.asarray(a), jnp.asarray(b) * np.float32(file.strength)


def _read(file: _File, key: str) -> np.ndarray:
    """The values behind a key in float32; UserError if one of them is not finite."""
    with np.errstate(over="ignore"):
        values = file.arrays[key].read().astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(
            f"LoRA file {file.path}: {key!r} has numbers that are not finite (NaN or infinite); its training had "
            "failed, or the file is damaged: use another one."
        )
    return values


def _check_family(file: _File, shapes: Mapping[str, PyTree]) -> None:
    """Refuses a file for UNets that take other text embeddings, which tells SD1.x, SD2.x and SDXL apart."""
    ours = lora_keys.text_widths(shapes[lora_keys.UNET])
    for key, array in file.arrays.items():
        width = lora_keys.text_width(key, array.shape)
        if width is not None and ours and width not in ours:
            theirs, here = (_FAMILIES.get(w, "another kind of model") for w in (width, min(ours)))
            raise UserError(
                f"LoRA file {file.path} was made for another model: {key!r} takes text embeddings {width} wide "
                f"({theirs}), but here they are {min(ours)} wide ({here})."
            )


def _refuse_left_over(file: _File, left: list[str], shapes: Mapping[str, PyTree]) -> None:
    for key in sorted(left):
        part = lora_keys.text_encoder_of(key)
        if part is not None and part not in shapes:
            raise UserError(
                f"LoRA file {file.path} adapts {part} ({key!r}), which this model does not have; it was made for "
                "another model."
            )
    raise UserError(
        f"LoRA file {file.path} has keys that fit no layer of this model ({', '.join(sorted(left)[:3])}); it was made "
        "for another model or holds other kinds of adapters."
    )
