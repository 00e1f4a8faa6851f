"""The authors' numbers (float32, computed by their released PyTorch code) and the tiny models that gave them."""

import atexit
import shutil
import tarfile
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from spo_jax.types import PoolNoise

_STORED = Path(__file__).parent / "golden"
# The models are packed, because 3 MB is what the tests may weigh.
FOLDER = Path(tempfile.mkdtemp(prefix="spo_jax_golden_"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
with tarfile.open(_STORED / "models.tar.xz") as _archive:
    _archive.extractall(FOLDER, filter="data")


def load() -> dict[str, np.ndarray]:
    """All recorded arrays by name; images and latents are NCHW."""
    with np.load(_STORED / "golden.npz", allow_pickle=False) as stored:
        return dict(stored)


def nhwc(array: np.ndarray) -> jnp.ndarray:
    """[..., C, H, W] to [..., H, W, C]."""
    return jnp.asarray(np.moveaxis(array, -3, -1))


def pool_noise(golden: dict[str, np.ndarray], num_steps: int, num_plain_steps: int) -> PoolNoise:
    """The recorded noise and choices of the trajectory; candidates were recorded [k, B, ...]."""
    return PoolNoise(
        initial=nhwc(golden["pool_latents"]),
        plain=jnp.stack([nhwc(golden[f"pool_noise_{i}"]) for i in range(num_plain_steps)]),
        candidates=jnp.stack(
            [nhwc(golden[f"pool_noise_{i}"]).swapaxes(0, 1) for i in range(num_plain_steps, num_steps)]
        ),
        choices=jnp.asarray(golden["pool_choice"]),
    )
