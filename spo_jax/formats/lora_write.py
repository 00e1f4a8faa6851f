"""Writing LoRA files: ``pytorch_lora_weights.safetensors`` of diffusers, and the layout of the kohya trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError
from spo_jax.formats import lora_keys
from spo_jax.formats.lora import FILE_NAME
from spo_jax.formats.lora_keys import Layer
from spo_jax.formats.original_configs import model_spec
from spo_jax.formats.safetensors_io import write_tensors

KOHYA_FILE_NAME = "kohya_lora_weights.safetensors"
# Width of the text embeddings of SD2.x; SD1.x has 768.
_SD2_WIDTH = 1024
# Largest values of a matrix in float16: a thousandth of the first is still a normal number, the second no infinity.
_ROOM = (2.0**-4, 2.0**15)
_VERSIONS = {"SD1": "sd_v1", "SD2": "sd_v2", "SDXL": "sdxl_base_v1-0"}  # kohya's names of the kinds


def write_lora(path: str | Path, lora: PyTree, *, dtype: DTypeLike = np.float32) -> Path:
    """Writes adapters in the layout of diffusers' trainers; returns the file's path. Arguments as of ``write_kohya``.

    The layout has one alpha for all layers of a part, and here it is the rank: layers of smaller rank are filled up
    with zeros.

    Raises:
      UserError: the adapters are too large for the dtype.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE_NAME
    layers = list(_layers(lora, dtype))
    ranks: dict[str, int] = {}
    for layer, down, _ in layers:
        ranks[layer.part] = max(ranks.get(layer.part, 0), len(down))
    tensors = {}
    for layer, down, up in layers:
        keys, missing = lora_keys.diffusers_keys(layer), ranks[layer.part] - len(down)
        tensors[keys.down] = np.pad(down, [(0, missing)] + [(0, 0)] * (down.ndim - 1))
        tensors[keys.up] = np.pad(up, [(0, 0), (0, missing)] + [(0, 0)] * (up.ndim - 2))
    write_tensors(file, tensors)
    return file


def write_kohya(
    path: str | Path,
    lora: PyTree,
    unet_shapes: PyTree,
    *,
    dtype: DTypeLike = np.float32,
    prediction_type: str = "epsilon",
    image_size: tuple[int, int] | None = None,
) -> Path:
    """Writes adapters as ``lora_unet_<module>.lora_down/lora_up.weight`` and ``.alpha``, alpha = rank.

    Args:
      path: a folder, or a file name that ends in ``.safetensors``.
      lora: a tree of adapters for each part, see ``read_lora``.
      unet_shapes: UNet parameters or their shapes; they tell SD1.x, SD2.x and SDXL apart.
      dtype: of the written tensors; an alpha that it would round is float32.
      prediction_type: of the scheduler, for the header.
      image_size: height and width that it was made for, for the header, if they are known.

    Raises:
      UserError: the adapters are too large for the dtype.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / KOHYA_FILE_NAME
    tensors: dict[str, np.ndarray] = {}
    ranks = set()
    for layer, down, up in _layers(lora, dtype):
        keys = lora_keys.kohya_keys(layer, unet_shapes)
        tensors[keys.down], tensors[keys.up] = down, up
        alpha = np.array(len(down), dtype)
        tensors[keys.alpha] = alpha if alpha == len(down) else np.array(len(down), np.float32)
        ranks.add(len(down))
    title = file.stem if path == file else file.absolute().parent.name
    header = _kohya_header(unet_shapes, title, prediction_type, image_size)
    # The trainer's own tools write "Dynamic" where layers differ.
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"
    write_tensors(file, tensors, metadata=header | {"ss_network_dim": rank, "ss_network_alpha": rank})
    return file


def _kohya_header(
    unet_shapes: PyTree, title: str, prediction_type: str, image_size: tuple[int, int] | None
) -> dict[str, str]:
    """What programs sort and label files by: kohya's own fields, and ``model_spec``."""
    is_sd2 = _SD2_WIDTH in lora_keys.text_widths(unet_shapes)
    kind = "SDXL" if lora_keys.is_sdxl(unet_shapes) else "SD2" if is_sd2 else "SD1"
    return {
        # A1111 shows a file only with models of the version that the metadata name.
        "ss_base_model_version": _VERSIONS[kind],
        "ss_v2": str(kind == "SD2"),
        "ss_network_module": "networks.lora",
        "ss_output_name": title,
        **model_spec(kind, title, prediction_type, image_size, is_lora=True),
    }


def _layers(lora: PyTree, dtype: DTypeLike) -> Iterator[tuple[Layer, np.ndarray, np.ndarray]]:
    """Each adapted layer, its down matrix [r, in] or [r, in, h, w], and its up matrix [out, r] or [out, r, 1, 1]."""
    flat = flax.traverse_util.flatten_dict(jax.device_get(lora))
    for (part, *path, name), a in flat.items():
        if name != "A":
            continue
        layer, b = Layer(part, tuple(path)), flat[(part, *path, "B")]
        a, b = _balanced(np.asarray(a, np.float32), np.asarray(b, np.float32), dtype)
        with np.errstate(over="ignore"):
            down, up = a.T.astype(dtype), b.T.astype(dtype)
        if not np.isfinite(down).all() or not np.isfinite(up).all():
            raise UserError(
                f"The adapters of {lora_keys.module_name(layer.path)} do not fit {np.dtype(dtype).name}; write them as "
                "float32."
            )
        if down.ndim == 4:  # [r, in, w, h]
            down, up = down.swapaxes(2, 3), up[:, :, None, None]
        yield layer, np.ascontiguousarray(down), np.ascontiguousarray(up)


def _balanced(a: np.ndarray, b: np.ndarray, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """The same product from factors of like size, which float16 rounds least; other dtypes have room for any size.

    Factors move between column j of ``A`` and row j of ``B`` in powers of two, which is exact; where both have room,
    all stays as it is.
    """
    if np.dtype(dtype) != np.float16:
        return a, b
    largest_a = np.abs(a).max(axis=tuple(range(a.ndim - 1)))
    largest_b = np.abs(b).max(axis=1)
    crowded = [(largest < _ROOM[0]) | (largest > _ROOM[1]) for largest in (largest_a, largest_b)]
    there = (largest_a > 0) & (largest_b > 0) & (crowded[0] | crowded[1])
    exponents = np.zeros(len(b), np.int32)
    exponents[there] = np.rint((np.log2(largest_a[there]) - np.log2(largest_b[there])) / 2)
    return np.ldexp(a, -exponents), np.ldexp(b, exponents[:, None])
