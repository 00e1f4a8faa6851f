"""What identifies weights and images: their SHA-256, which is stored with each number."""

from __future__ import annotations

import hashlib

from spo_jax.files import sha256_of
from spo_jax.formats.hub import resolve_model, with_strength

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def sha256_of_weights(name: str) -> str:
    """Of a weight file, or of all that a folder has, with their places in it; of a model by its name."""
    path = resolve_model(with_strength(name)[0])
    if path.is_file():
        return sha256_of(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS and "checkpoints" not in file.parts)
    told = "\n".join(f"{file.relative_to(path)} {sha256_of(file)}" for file in files)
    return hashlib.sha256(told.encode()).hexdigest()
