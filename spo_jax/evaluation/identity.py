"""What identifies weights and images: their SHA-256, which is stored with each number."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from spo_jax.formats.hub import resolve_model, with_strength

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@functools.cache
def sha256_of_file(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(name: str) -> str:
    """Of a weight file, or of all that a folder has, with their places in it; of a model by its name."""
    path = resolve_model(with_strength(name)[0])
    if path.is_file():
        return sha256_of_file(path)
    files = sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS and "checkpoints" not in file.parts)
    told = "\n".join(f"{file.relative_to(path)} {sha256_of_file(file.resolve())}" for file in files)
    return hashlib.sha256(told.encode()).hexdigest()
