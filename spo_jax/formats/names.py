"""Between the paths of our parameter trees and the keys of PyTorch checkpoints.

Our module names are the checkpoint's, with a list index joined by an underscore (``to_out.0`` is ``to_out_0``), so the
whole translation is two rules: the leaf's name and layout, and the dot before an index.
"""

from __future__ import annotations

import re

import numpy as np

# Underscore and digit belong to the name itself in these PyTorch modules.
_NOT_AN_INDEX = {"linear_1", "linear_2"}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# The autoencoders of SD1.x were saved before diffusers renamed their attention layers.
_LEGACY_VAE = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def torch_key(path: tuple[str, ...]) -> str:
    """Key of the parameter at ``path``, for example ``("down_blocks_0", ..., "to_out_0", "kernel")``."""
    *modules, leaf = path
    parts = [m if m in _NOT_AN_INDEX else re.sub(r"_(\d+)$", r".\1", m) for m in modules]
    return ".".join([*parts, _LEAVES.get(leaf, leaf)])


def other_keys(key: str) -> list[str]:
    """Other names under which checkpoints hold ``key``: old autoencoders, and text encoders of transformers 5."""
    legacy = key
    for new, old in _LEGACY_VAE.items() if ".attentions.0." in key else ():
        legacy = legacy.replace(new, old)
    return [legacy, key.removeprefix("text_model.")]


def torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in the checkpoint of the parameter that has ``shape`` here."""
    if path[-1] == "kernel" and len(shape) == 4:
        return (shape[3], shape[2], shape[0], shape[1])
    return shape[::-1] if path[-1] == "kernel" else shape


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Checkpoint layout to ours: dense [out, in] to [in, out], convolution [out, in, h, w] to [h, w, in, out]."""
    if path[-1] == "kernel":
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array


def to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """The inverse of ``from_torch``."""
    if path[-1] == "kernel":
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array
