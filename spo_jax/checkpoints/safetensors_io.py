"""Parameter trees from and to safetensors files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
import safetensors.numpy

from spo_jax.checkpoints import names
from spo_jax.errors import UserError

# Buffers that old checkpoints carry and that hold no information.
_IGNORED_SUFFIXES = (".position_ids",)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file (bfloat16 included).

    Raises:
      UserError: the file is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise UserError(f"Weight file {path} does not exist; check the model path or download the checkpoint again.")
    try:
        return {k: np.asarray(v) for k, v in safetensors.flax.load_file(str(path)).items()}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise UserError(f"Weight file {path} is damaged or truncated ({error}); download or copy it again.") from error


def read_params(path: Path, shapes: Any, *, prefix: str = "") -> Any:
    """Reads one model's parameters: every key of the file is used exactly once and every shape agrees.

    Args:
      path: a ``.safetensors`` file in PyTorch naming and layout.
      shapes: tree of ``jax.ShapeDtypeStruct``; the result has its structure and dtypes.
      prefix: what every key of the file starts with (the released preference models use ``"model."``).

    Returns:
      A tree of NumPy arrays.

    Raises:
      UserError: a missing, left-over or wrongly shaped key, by name.
    """
    tensors = read_tensors(path)
    tensors = {k: v for k, v in tensors.items() if not k.endswith(_IGNORED_SUFFIXES)}
    params = {}
    for tree_path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        key = prefix + names.torch_key(tree_path)
        key = next((k for k in (key, *names.other_keys(key)) if k in tensors), key)
        if key not in tensors:
            raise UserError(
                f"Weight file {path} has no key {key!r}, which its config.json asks for; "
                "the file and the config do not belong together."
            )
        array = tensors.pop(key)
        expected = names.torch_shape(tree_path, leaf.shape)
        if array.shape != expected and (*array.shape, 1, 1) == expected:
            array = array[:, :, None, None]
        if array.shape != expected:
            raise UserError(
                f"Weight file {path}: {key!r} has shape {array.shape}, but its config.json asks for {expected}."
            )
        params[tree_path] = np.asarray(names.from_torch(tree_path, array), leaf.dtype, order="C")
    if tensors:
        listed = ", ".join(sorted(tensors)[:3])
        raise UserError(
            f"Weight file {path} has {len(tensors)} keys that the model in config.json does not use ({listed}"
            f"{', ...' if len(tensors) > 3 else ''}); the file and the config do not belong together."
        )
    return flax.traverse_util.unflatten_dict(params)


def write_params(path: Path, params: Any, *, dtype: Any = np.float32, prefix: str = "") -> None:
    """Writes a parameter tree in PyTorch naming and layout; the file appears complete or not at all."""
    tensors = {}
    for tree_path, value in flax.traverse_util.flatten_dict(jax.device_get(params)).items():
        array = names.to_torch(tree_path, np.asarray(value)).astype(dtype)
        tensors[prefix + names.torch_key(tree_path)] = np.asarray(array, order="C")
    write_tensors(path, tensors)


def write_tensors(path: Path, tensors: dict[str, np.ndarray], *, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors by way of a temporary file, so that a reader never sees half of one.

    ``metadata`` goes into the file's header, beside the ``format`` that PyTorch's readers look for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        safetensors.numpy.save_file(tensors, str(temporary), metadata={"format": "pt"} | (metadata or {}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def param_shapes(module: Any, *inputs: Any, dtype: Any = jnp.float32, **kwargs: Any) -> Any:
    """Shapes of a module's parameters, as ``dtype``, without computing anything."""
    shapes = jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a, **kwargs), *inputs)["params"]
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)
