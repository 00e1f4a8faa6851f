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
# The models are packed, because the tests should not weigh more than they must.
FOLDER = Path(tempfile.mkdtemp(prefix="spo_jax_golden_"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
for _name in ("models.tar.xz", "sdxl.tar.xz"):
    with tarfile.open(_STORED / _name) as _archive:
        _archive.extractall(FOLDER, filter="data")


def load() -> dict[str, np.ndarray]:
    """All recorded arrays by name; images and latents are NCHW."""
    arrays = {}
    for file in (
        _STORED / "golden.npz",
        FOLDER / "golden_sdxl.npz",
        _STORED / "criterion.npz",
        _STORED / "gradspo.npz",
    ):
        with np.load(file, allow_pickle=False) as stored:
            arrays |= dict(stored)
    return arrays


def nhwc(array: np.ndarray) -> jnp.ndarray:
    """[..., C, H, W] to [..., H, W, C]."""
    return jnp.asarray(np.moveaxis(array, -3, -1))


def pool_noise(
    golden: dict[str, np.ndarray],
    num_steps: int,
    num_plain_steps: int,
    name: str = "pool",
    num_candidates: int = 4,
    num_inner_steps: int = 0,
) -> PoolNoise:
    """The recorded noise and choices of the trajectory ``name``; candidates were recorded [k, B, ...] or [k*B, ...]."""
    initial = nhwc(golden["pool_latents"])

    def candidates(step: int) -> jnp.ndarray:
        return nhwc(golden[f"{name}_noise_{step}"]).reshape(num_candidates, *initial.shape).swapaxes(0, 1)

    choices = np.zeros((num_steps - num_plain_steps - 1, len(initial)), np.int32)
    choices[num_inner_steps :: num_inner_steps + 1] = golden[f"{name}_choice"]
    return PoolNoise(
        initial=initial,
        plain=jnp.stack([nhwc(golden[f"{name}_noise_{i}"]) for i in range(num_plain_steps)]),
        candidates=jnp.stack([candidates(i) for i in range(num_plain_steps, num_steps)]),
        choices=jnp.asarray(choices),
    )
