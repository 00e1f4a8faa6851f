"""A pipeline whose UNet has one level, for tests that would mostly wait for their programs to be compiled."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from spo_jax.formats.hub import local
from spo_jax.formats.networks import network_shapes
from spo_jax.formats.safetensors_io import write_params
from spo_jax.models import UNet2DConditionModel


@functools.cache
def small_pipeline() -> Path:
    """The folder of the emoji models, with random weights in a UNet of one level; it goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="spo_jax_small_")) / "model"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    shutil.copytree(local("emoji:model"), folder)
    config = folder / "unet" / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8")) | {
        "block_out_channels": [64],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    }
    config.write_text(json.dumps(fields), encoding="utf-8")
    unet = UNet2DConditionModel.from_config(fields)
    generator = np.random.default_rng(0)

    def draw(path, x):
        kind = path[-1].key
        value = generator.standard_normal(x.shape, np.float32) / np.sqrt(np.prod(x.shape[:-1]))
        return {"kernel": value, "bias": 0 * value, "scale": 1 + 0 * value}[kind]

    params = jax.tree_util.tree_map_with_path(draw, network_shapes(unet))
    write_params(folder / "unet" / "diffusion_pytorch_model.safetensors", params, dtype=np.float32)
    return folder
