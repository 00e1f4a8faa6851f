"""Safetensors files, and parameter trees to them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError
from spo_jax.files import atomic_write
from spo_jax.formats import names
from spo_jax.formats.hub import missing
from spo_jax.formats.json_files import Json
from spo_jax.formats.stored import StoredArray

_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def index_safetensors(path: Path) -> dict[str, StoredArray]:
    """The tensors of a safetensors file by key (bfloat16 included); none of their values is read yet.

    Raises:
      UserError: the file is missing, truncated, not a safetensors file, or has a dtype that NumPy does not know.
    """
    length, header = _read_header(path)
    header.pop("__metadata__", None)
    arrays = {}
    for key, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"Weight file {path}: {key!r} has dtype {entry['dtype']}, which is not supported.")
        offset = 8 + length + entry["data_offsets"][0]
        arrays[key] = StoredArray(path, offset, np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]))
    return arrays


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; errors as of ``index_safetensors``."""
    return _read_header(path)[1].get("__metadata__") or {}


def _read_header(path: Path) -> tuple[int, Json]:
    """Length in bytes of the header, and its content."""
    if not path.is_file():
        raise UserError(missing(path, "Weight file"))
    try:
        safetensors.safe_open(str(path), "numpy")  # checks the header and that the tensors fill the file exactly
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length, json.loads(file.read(length))
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise UserError(f"Weight file {path} is damaged or truncated ({error}); download or copy it again.") from error


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file; errors as of ``index_safetensors``."""
    return {key: array.read() for key, array in index_safetensors(path).items()}


def write_params(path: Path, params: PyTree, *, dtype: DTypeLike = np.float32, prefix: str = "") -> None:
    """Writes a parameter tree in PyTorch naming and layout; the file appears complete or not at all.

    Parameters, which may be split over devices, are fetched, converted and written one at a time: the host needs room
    for two copies of the largest of them.
    """
    flat = {prefix + names.torch_key(path): (path, x) for path, x in flax.traverse_util.flatten_dict(params).items()}
    flat = dict(sorted(flat.items()))
    shapes = {
        key: jax.ShapeDtypeStruct(names.torch_shape(tree_path, value.shape), dtype)
        for key, (tree_path, value) in flat.items()
    }
    write_arrays(path, shapes, (names.to_torch(tree_path, fetch_array(value)) for tree_path, value in flat.values()))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as the library of the format does, by falling size of their numbers; see ``write_arrays``."""
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    shapes = {key: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for key, tensor in ordered.items()}
    write_arrays(path, shapes, ordered.values(), metadata=metadata)


def write_arrays(
    path: Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    arrays: Iterable[np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays one at a time, each dropped before the next is asked for; the file appears complete or not at all.

    Args:
      path: of the file.
      shapes: shape and dtype in the file by key, in the order of ``arrays``.
      arrays: of these shapes; they are converted to the dtypes.
      metadata: goes into the header, beside the ``format`` that PyTorch's readers look for.
    """
    header: Json = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key, leaf in shapes.items():
        begin, end = end, end + math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        header[key] = {"dtype": _NAMES[np.dtype(leaf.dtype)], "shape": leaf.shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start at a multiple of eight bytes
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for array, leaf in zip(arrays, shapes.values(), strict=True):
            file.write(np.ascontiguousarray(array, leaf.dtype).reshape(-1).view(np.uint8).data)


def fetch_array(value: ArrayLike) -> np.ndarray:
    """The values of an array that may be split over devices."""
    # Of a copy, because JAX keeps what it fetched as long as the array that it was fetched from.
    return np.asarray(jnp.copy(value) if isinstance(value, jax.Array) else value)
