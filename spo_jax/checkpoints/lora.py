"""Adapters as diffusers writes and reads them: ``pytorch_lora_weights.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from spo_jax.checkpoints import names
from spo_jax.checkpoints.safetensors_io import read_tensors, write_tensors
from spo_jax.errors import UserError
from spo_jax.models.lora import TARGETS

FILE_NAME = "pytorch_lora_weights.safetensors"
# Ours -> (peft's name, as diffusers 0.42 writes it; the older diffusers name, as the released SPO adapters have it).
_SUFFIXES = {"A": ("lora_A.weight", "lora.down.weight"), "B": ("lora_B.weight", "lora.up.weight")}


def _module_key(path: tuple[str, ...]) -> str:
    return "unet." + names.torch_key((*path[:-1], "kernel")).removesuffix(".weight")


def write_lora(path: str | Path, lora: Any) -> Path:
    """Writes adapters as ``unet.<module>.lora_A/lora_B.weight``, float32, alpha = rank; returns the file's path.

    Args:
      path: a folder, or a file name that ends in ``.safetensors``.
      lora: tree of ``{"A": [in, r], "B": [r, out]}``.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME
    tensors = {}
    for tree_path, value in flax.traverse_util.flatten_dict(jax.device_get(lora)).items():
        suffix, _ = _SUFFIXES[tree_path[-1]]
        tensors[f"{_module_key(tree_path)}.{suffix}"] = np.ascontiguousarray(np.asarray(value, np.float32).T)
    write_tensors(file, tensors)
    return file


def read_lora(path: str | Path, shapes: Any) -> Any:
    """Reads adapters for a UNet; alpha / rank is folded into ``B``.

    Args:
      path: the file, or the folder that holds it.
      shapes: UNet parameters or their shapes (names and shapes are read).

    Raises:
      UserError: the file is missing or damaged, a key or shape does not fit the UNet, or it adapts other layers than
        the attention projections, which alone have adapters here.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    tensors = read_tensors(file)
    common_alpha = _alpha_of_metadata(file)
    lora = {}
    for tree_path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        module = _module_key(tree_path)
        if tree_path[-1] != "kernel" or tree_path[-2] not in TARGETS:
            continue
        if not any(f"{module}.{s}" in tensors for suffixes in _SUFFIXES.values() for s in suffixes):
            continue
        pair = {}
        for name, suffixes in _SUFFIXES.items():
            found = [f"{module}.{s}" for s in suffixes if f"{module}.{s}" in tensors]
            if not found:
                raise UserError(
                    f"LoRA file {file}: {module!r} has only one of its two matrices; the file is incomplete."
                )
            pair[name] = tensors.pop(found[0]).T.astype(np.float32)
        rank = pair["A"].shape[-1] if pair["A"].ndim == 2 else 0
        if rank == 0 or pair["A"].shape[0] != leaf.shape[0] or pair["B"].shape != (rank, leaf.shape[1]):
            raise UserError(
                f"LoRA file {file}: {module!r} has shapes {pair['A'].shape} and {pair['B'].shape}, which do not fit "
                f"the UNet's {tuple(leaf.shape)}; it was made for another model."
            )
        alpha = tensors.pop(f"{module}.alpha", common_alpha)
        if alpha is not None:
            pair["B"] = pair["B"] * np.float32(alpha / rank)
        for name, value in pair.items():
            lora[(*tree_path[:-1], name)] = jnp.asarray(value)
    if tensors or not lora:
        problem = (
            f"has keys that fit nothing in this UNet ({', '.join(sorted(tensors)[:3])})" if tensors else "is empty"
        )
        raise UserError(f"LoRA file {file} {problem}; it was made for another model or holds other kinds of adapters.")
    return flax.traverse_util.unflatten_dict(lora)


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
