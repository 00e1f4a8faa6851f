"""The authors' numbers (float32, computed by their released PyTorch code) and the tiny models that gave them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from spo_jax.types import PoolNoise

FOLDER = Path(__file__).parent / "golden"


def load() -> dict[str, np.ndarray]:
    """All recorded arrays by name; images and latents are NCHW."""
    with np.load(FOLDER / "golden.npz", allow_pickle=False) as stored:
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
