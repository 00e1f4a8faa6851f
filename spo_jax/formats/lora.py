"""Reading LoRA files of others: diffusers, peft, the kohya trainer, OneTrainer; in safetensors or PyTorch's files.

peft's ``LoraConfig`` tells how strong adapters are. It lies beside peft's files as ``adapter_config.json``; diffusers
keeps it as JSON in the header, with the name of the part before each field (``unet.lora_alpha``) where it has several.

Every layout is read as ``{"unet": tree, "text_encoder": tree, "text_encoder_2": tree}``, without the parts that the
file does not adapt. A tree holds float32 adapters, see ``models/lora.py``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from spo_jax.distributed.processes import is_main_process
from spo_jax.errors import UserError, notice
from spo_jax.formats import lora_keys
from spo_jax.formats.hub import fetched, with_strength
from spo_jax.formats.json_files import Json, read_json
from spo_jax.formats.lora_keys import PARTS, Layer
from spo_jax.formats.stored import StoredArray
from spo_jax.formats.weights import TORCH_SUFFIXES, open_file
from spo_jax.models.lora import TARGETS, init_lora

FILE_NAME = "pytorch_lora_weights.safetensors"
# In the order in which a folder is searched.
_FILE_NAMES = (FILE_NAME, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
_FAMILIES = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}  # by the width of their text embeddings
_CONFIG_FILE = "adapter_config.json"
_PEFT_STEM = "adapter_model"
_DEFAULT_ALPHA = 8.0  # of LoraConfig
# With these, training starts from other base weights, which are not in the file.
_CHANGED_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga|orthogonal", re.IGNORECASE)


class _PeftConfig(NamedTuple):
    """The fields that say how strong adapters are; ``patterns`` holds alphas of layers that have their own."""

    alpha: float
    patterns: Mapping[str, float]
    rank_stabilized: bool

    def scale(self, module: str, rank: int) -> float:
        """The factor of the product of a layer's matrices; ``module`` is the layer's name in its model."""
        # As in peft: the layer's whole name, or its last parts unless ``^`` says where it starts. transformers 5 leaves
        # out the first part of a text encoder's names.
        modules, alpha = (module, module.removeprefix("text_model.")), self.alpha
        for pattern, own in self.patterns.items():
            bare = pattern.removeprefix("^").removesuffix("$")
            if bare in modules or (not pattern.startswith("^") and module.endswith(f".{bare}")):
                alpha = own
                break
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


class _File(NamedTuple):
    """A LoRA file whose values are still in it; ``configs`` are peft's, by part, and ``strength`` is the user's."""

    path: Path
    arrays: dict[str, StoredArray]
    configs: dict[str, _PeftConfig]
    strength: float = 1.0


def read_lora(path: str | Path, shapes: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Reads adapters in any layout of ``lora_keys``; the scale, alpha / rank, is folded into ``B``.

    Args:
      path: the file, or the folder that holds it; local, or on the hub (see ``resolve_model``).
      shapes: trees of parameters or their shapes by part, at least ``"unet"``; other entries are not looked at.

    Raises:
      UserError: the file is missing or damaged, does not fit the pipeline, or holds another kind of adapters, or
        numbers that are not finite.
    """
    return _parts(_open(path), shapes)


def read_adapters(lora_names: Iterable[str], shapes: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The sum of several adapters, each by its name and strength (see ``hub.with_strength``), as ``read_lora``. The
    sum of two low-rank matrices is one of both ranks together: ``[A1, A2] [s1 B1; s2 B2]``."""
    layers: dict[tuple[str, ...], list[jax.Array]] = {}
    for lora_name in lora_names:
        for path, value in flax.traverse_util.flatten_dict(_parts(_named(lora_name), shapes)).items():
            layers.setdefault(path, []).append(value)
    return flax.traverse_util.unflatten_dict(
        {path: jnp.concatenate(values, axis=-1 if path[-1] == "A" else 0) for path, values in layers.items()}
    )


def check_lora_files(lora_names: Iterable[str]) -> None:
    """Raises UserError as ``read_lora``, of what can be told without a model and without the values in the files."""
    for lora_name in lora_names:
        _named(lora_name)


def starting_lora(key: jax.Array, params: PyTree, rank: int, lora_name: str | None) -> PyTree:
    """Adapters of the UNet to start training from: those of a file, and fresh ones where it has none.

    The file's layers keep their ranks, and all of them are trained, also those that would get no fresh adapters; a
    notice tells what differs from the config.

    Args:
      key: PRNG key of the fresh ones; ``rank`` is theirs.
      params: UNet parameters (only names and shapes are read).
      lora_name: of ``read_adapters``; None for fresh adapters everywhere.

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
    ranks = sorted({x.shape[-1] for p, x in read.items() if p[-1] == "A"})
    more = sum(p[-1] == "A" and p[-2] not in TARGETS for p in read)
    said = []
    if ranks != [rank]:
        said.append(f"its layers keep rank {' and '.join(map(str, ranks))}, where config.lora.rank is {rank}")
    if more:
        said.append(f"{more} layers beyond the attention projections are trained as well")
    if said and is_main_process():
        notice(f"training starts from LoRA file {file.path}: {'; '.join(said)}.")
    return flax.traverse_util.unflatten_dict(lora | read)


# ----------------------------------------------------------------------------------------------------------- the file
def _named(lora_name: str) -> _File:
    """The file that a name of adapters with a strength stands for, see ``_open``."""
    name, strength = with_strength(lora_name)
    return _open(name)._replace(strength=strength)


def _open(path: str | Path) -> _File:
    """The file that a name of adapters stands for, without its values; refuses other kinds of adapters."""
    path = fetched(path)
    folders = {part: path / part for part in PARTS if (path / part / _CONFIG_FILE).is_file()}
    if folders and not any((path / name).is_file() for name in _FILE_NAMES):
        # As peft's own examples save a UNet and its text encoder: a folder for each, whose keys do not name it.
        files = {part: _open(folder) for part, folder in folders.items()}
        arrays = {f"{part}.{key}": array for part, file in files.items() for key, array in file.arrays.items()}
        configs = {part: file.configs[part] for part, file in files.items() if part in file.configs}
        return _File(path, arrays, configs)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", *TORCH_SUFFIXES) and p.is_file())
        usual = [path / name for name in _FILE_NAMES if path / name in found]
        if not usual and len(found) != 1:
            listed = f"it has {', '.join(p.name for p in found[:3])}: name one of them" if found else None
            raise UserError(f"Folder {path} has no {' or '.join(_FILE_NAMES)}; {listed or 'is it the right folder?'}")
        path = (usual or found)[0]
    if not path.is_file():
        raise UserError(f"LoRA file {path} does not exist; give a LoRA file, or the --workdir of a training run.")
    weights = open_file(path)
    arrays = weights.arrays
    if not arrays:
        raise UserError(f"LoRA file {path} is empty; it was not saved properly.")
    if other := lora_keys.other_kind(arrays):
        raise UserError(
            f"LoRA file {path} holds {other[1]} ({other[0]!r}), which is not supported; only plain LoRA of linear and "
            "convolution layers is: train or convert it to that."
        )
    return _File(path, arrays, _read_configs(path, weights.metadata))


def _read_configs(file: Path, metadata: Mapping[str, str]) -> dict[str, _PeftConfig]:
    """The config of each part that has one; of others alpha is the rank."""
    source = file.with_name(_CONFIG_FILE) if file.name.startswith(_PEFT_STEM) else file
    if source != file and not source.is_file():
        raise UserError(
            f"LoRA file {file} is one of peft's, but {source} is not beside it; its alpha is needed: copy it as well."
        )
    try:
        fields = read_json(source) if source != file else json.loads(metadata.get("lora_adapter_metadata") or "{}")
        starts = tuple(f"{part}." for part in PARTS)
        common = {key: value for key, value in fields.items() if not key.startswith(starts)}
        by_part = {
            part: {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)} or common
            for part, start in zip(PARTS, starts, strict=True)
        }
        return {part: _config(source, one) for part, one in by_part.items() if one}
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"LoRA file {source} has damaged metadata ({error}); download or copy it again.") from error


def _config(source: Path, fields: Json) -> _PeftConfig:
    kind = fields.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA" or fields.get("use_dora"):
        kind = kind if str(kind).upper() != "LORA" else "DoRA"
        raise UserError(f"LoRA file {source} holds {kind}, which is not supported; only plain LoRA is.")
    for field in ("lora_bias", "use_qalora"):
        if fields.get(field):
            raise UserError(f"LoRA file {source}: {field} = {fields[field]!r} in its metadata is not supported.")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and _CHANGED_BASE.match(start):
        raise UserError(
            f"LoRA file {source}: its metadata has init_lora_weights = {start!r}, which changes the base "
            "model as well; convert it to plain LoRA with peft (path_initial_model_for_weight_conversion)."
        )
    patterns = {pattern: float(alpha) for pattern, alpha in (fields.get("alpha_pattern") or {}).items()}
    unclear = next((p for p in patterns if re.search(r"[*+?()\[\]{}|\\]", p)), None)
    if unclear is not None:
        raise UserError(
            f"LoRA file {source}: its metadata has {unclear!r} in alpha_pattern, which is not the name of a layer; "
            "regular expressions are not supported."
        )
    alpha = fields.get("lora_alpha")
    alpha = _DEFAULT_ALPHA if alpha is None else float(alpha)
    for value in (alpha, *patterns.values()):
        if not math.isfinite(value):
            raise UserError(f"LoRA file {source}: its metadata has an alpha that is not finite, {value}.")
    return _PeftConfig(alpha, patterns, bool(fields.get("use_rslora")))


# ---------------------------------------------------------------------------------------------------------- its layers
def _parts(file: _File, shapes: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """The adapters in a file, each at its layer of a pipeline with such parameters."""
    # SD1.x, SD2.x and SDXL differ in the width of the text embeddings that their UNets take.
    widths, spellings = lora_keys.text_widths(shapes[lora_keys.UNET]), lora_keys.spellings(shapes)
    found: dict[Layer, dict[str, str]] = {}
    left = []
    for key, array in file.arrays.items():
        width = lora_keys.text_width(key, array.shape)
        if width is not None and widths and width not in widths:
            theirs, here = (_FAMILIES.get(w, "another kind of model") for w in (width, min(widths)))
            raise UserError(
                f"LoRA file {file.path} was made for another model: {key!r} takes text embeddings {width} wide "
                f"({theirs}), but here they are {min(widths)} wide ({here})."
            )
    for key in file.arrays:
        module, role = lora_keys.parse_key(key)
        if module not in spellings:
            left.append(key)
        elif (other := found.setdefault(spellings[module], {}).setdefault(role, key)) != key:
            raise UserError(
                f"LoRA file {file.path} has both {other!r} and {key!r} for one layer; save each of its adapters in a "
                "file of its own."
            )
    for key in sorted(left):
        part = lora_keys.text_encoder_of(key)
        if part is not None and part not in shapes:
            raise UserError(
                f"LoRA file {file.path} adapts {part} ({key!r}), which this model does not have; it was made for "
                "another model."
            )
    if left:
        raise UserError(
            f"LoRA file {file.path} has keys that fit no layer of this model ({', '.join(sorted(left)[:3])}); it was "
            "made for another model or holds other kinds of adapters."
        )
    kernels = flax.traverse_util.flatten_dict({part: shapes[part] for part in PARTS if part in shapes})
    lora = {}
    for layer, keys in found.items():
        lora[*layer, "A"], lora[*layer, "B"] = _matrices(file, layer, keys, kernels[*layer, "kernel"].shape)
    return flax.traverse_util.unflatten_dict(lora)


def _matrices(file: _File, layer: Layer, keys: Mapping[str, str], kernel: Sequence[int]) -> tuple[jax.Array, jax.Array]:
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
    elif layer[0] in file.configs:
        scale = file.configs[layer[0]].scale(lora_keys.module_name(layer), rank)
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
