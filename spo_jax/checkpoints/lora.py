"""LoRA files of others: ``pytorch_lora_weights.safetensors`` of diffusers, and the layout of the kohya trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from spo_jax.checkpoints import lora_keys
from spo_jax.checkpoints.hub import fetched
from spo_jax.checkpoints.safetensors_io import read_tensors, write_tensors
from spo_jax.errors import UserError
from spo_jax.models.lora import TARGETS, init_lora

FILE_NAME = "pytorch_lora_weights.safetensors"
_TEXT_ENCODERS = ("text_encoder", "lora_te")
# Width of the text embeddings of SD2.x; SD1.x has 768.
_SD2_WIDTH = 1024


def write_lora(path: str | Path, lora: Any, *, dtype: Any = np.float32) -> Path:
    """Writes adapters as ``unet.<module>.lora_A/lora_B.weight``, which diffusers reads; returns the file's path.

    The layout has one alpha for all layers, and here it is the rank: layers of smaller rank are filled up with zeros.

    Args:
      path: a folder, or a file name that ends in ``.safetensors``.
      lora: tree of ``{"A": [in, r], "B": [r, out]}``.
      dtype: of the written tensors.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME
    layers = list(_layers(lora))
    rank = max(down.shape[0] for _, down, _ in layers)
    tensors = {}
    for layer, down, up in layers:
        keys, missing = lora_keys.diffusers_keys(layer), rank - down.shape[0]
        tensors[keys.down] = np.pad(down, ((0, missing), (0, 0))).astype(dtype)
        tensors[keys.up] = np.pad(up, ((0, 0), (0, missing))).astype(dtype)
    write_tensors(file, tensors)
    return file


def write_kohya(file: str | Path, lora: Any, shapes: Any, *, dtype: Any = np.float32) -> None:
    """Writes adapters as ``lora_unet_<module>.lora_down/lora_up.weight`` and ``.alpha``, alpha = rank.

    Args:
      file: the file's name.
      lora: tree of ``{"A": [in, r], "B": [r, out]}``.
      shapes: UNet parameters or their shapes; they tell SDXL from the others.
      dtype: of the written tensors.
    """
    tensors: dict[str, np.ndarray] = {}
    version = "sd_v1"
    for layer, down, up in _layers(lora):
        keys = lora_keys.kohya_keys(layer, shapes)
        tensors[keys.down], tensors[keys.up] = down.astype(dtype), up.astype(dtype)
        tensors[keys.alpha] = np.array(down.shape[0], dtype)
        if layer[-2:] == ("attn2", "to_k") and down.shape[1] == _SD2_WIDTH:
            version = "sd_v2"
    if lora_keys.is_sdxl(shapes):
        version = "sdxl_base_v1-0"
    # A1111 shows a file only with models of the version that the metadata name.
    write_tensors(Path(file), tensors, metadata={"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")})


def read_lora(path: str | Path, shapes: Any) -> Any:
    """Reads adapters for a UNet from any layout of ``lora_keys.spellings``; alpha / rank is folded into ``B``.

    Args:
      path: the file, or the folder that holds it; local, or on the hub (see ``resolve_model``).
      shapes: UNet parameters or their shapes (names and shapes are read).

    Raises:
      UserError: the file is missing or damaged, a key or shape does not fit the UNet, or it adapts other layers than
        the attention projections, which alone have adapters here.
    """
    path = fetched(path)
    file = path / FILE_NAME if path.is_dir() else path
    tensors = read_tensors(file)
    common_alpha = _alpha_of_metadata(file)
    lora = {}
    for tree_path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        if tree_path[-1] != "kernel" or tree_path[-2] not in TARGETS:
            continue
        layer = tree_path[:-1]
        keys = next((k for k in lora_keys.spellings(layer, shapes) if k.down in tensors or k.up in tensors), None)
        if keys is None:
            continue
        for key, other in ((keys.down, keys.up), (keys.up, keys.down)):
            if key not in tensors:
                raise UserError(f"LoRA file {file} has {other!r}, but not {key!r}; the file is incomplete.")
        a, b = (tensors.pop(key).T.astype(np.float32) for key in (keys.down, keys.up))
        rank = a.shape[-1] if a.ndim == 2 else 0
        if rank == 0 or a.shape[0] != leaf.shape[0] or b.shape != (rank, leaf.shape[1]):
            raise UserError(
                f"LoRA file {file}: {keys.down!r} and {keys.up!r} have shapes {a.T.shape} and {b.T.shape}, which do "
                f"not fit the UNet's {tuple(leaf.shape[::-1])}; it was made for another model."
            )
        alpha = tensors.pop(keys.alpha, common_alpha)
        if alpha is not None:
            if np.size(alpha) != 1:
                raise UserError(f"LoRA file {file}: {keys.alpha!r} has shape {np.shape(alpha)}, not a single number.")
            b = b * np.float32(float(np.ravel(alpha)[0]) / rank)
        lora[(*layer, "A")], lora[(*layer, "B")] = jnp.asarray(a), jnp.asarray(b)
    for key in sorted(tensors):
        if key.startswith(_TEXT_ENCODERS):
            raise UserError(
                f"LoRA file {file} adapts the text encoder too ({key!r}), and here only the UNet has adapters; "
                "use a file with the UNet's alone."
            )
    if tensors:
        raise UserError(
            f"LoRA file {file} has keys that fit no attention projection of this UNet "
            f"({', '.join(sorted(tensors)[:3])}); it was made for another model or holds other kinds of adapters."
        )
    if not lora:
        raise UserError(f"LoRA file {file} is empty; it was not saved properly.")
    return flax.traverse_util.unflatten_dict(lora)


def starting_lora(key: jax.Array, params: Any, rank: int, path: str | Path | None) -> Any:
    """Adapters to start training from: those of a file, and fresh ones on the layers that it leaves out.

    Args:
      key: PRNG key of the fresh ones.
      params: UNet parameters (only names and shapes are read).
      rank: inner dimension of every layer.
      path: see ``read_lora``; None for fresh adapters everywhere.

    Raises:
      UserError: as ``read_lora``, or the file's rank is another one.
    """
    lora = flax.traverse_util.flatten_dict(init_lora(key, params, rank))
    if path is not None:
        read = flax.traverse_util.flatten_dict(read_lora(path, params))
        ranks = {value.shape[1] for tree_path, value in read.items() if tree_path[-1] == "A"}
        if ranks != {rank}:
            found = " and ".join(str(r) for r in sorted(ranks))
            raise UserError(
                f"LoRA file {path} has rank {found}, but config.lora.rank is {rank}; to start from it, both must agree."
            )
        lora |= read
    return flax.traverse_util.unflatten_dict(lora)


def _layers(lora: Any) -> Iterator[tuple[tuple[str, ...], np.ndarray, np.ndarray]]:
    """Path, down matrix [r, in] and up matrix [out, r], both float32, of each adapted layer."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(lora))
    for path, a in flat.items():
        if path[-1] == "A":
            b = flat[(*path[:-1], "B")]
            down, up = (np.ascontiguousarray(np.asarray(x, np.float32).T) for x in (a, b))
            yield path[:-1], down, up


def _alpha_of_metadata(file: Path) -> float | None:
    """Alpha of all layers, where diffusers saved peft's ``LoraConfig`` in the file's header."""
    with safetensors.safe_open(str(file), "numpy") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        config = {k.removeprefix("unet."): v for k, v in json.loads(text).items()}
        alpha = config.get("lora_alpha")
        alpha = None if alpha is None else float(alpha)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"LoRA file {file} has damaged metadata ({error}); download or copy it again.") from error
    for field in ("alpha_pattern", "use_rslora", "use_dora"):
        if config.get(field):
            raise UserError(f"LoRA file {file}: its metadata has {field} = {config[field]!r}, which is not supported.")
    return alpha
