"""A preference model as a folder that this program, the original one and transformers can read."""

from __future__ import annotations

import json
from pathlib import Path

import flax.core
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from spo_jax.errors import UserError
from spo_jax.files import write_text
from spo_jax.formats.safetensors_io import write_params
from spo_jax.models import CLIPModel

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write_scorer(folder: str | Path, clip: CLIPModel, params: PyTree, *, dtype: DTypeLike = np.float32) -> None:
    """Writes ``config.json`` and ``model.safetensors``, which ``read_clip`` reads from the folder or from the file.

    The keys are transformers' CLIP names. Those of a step-aware model have the prefix ``model.`` and its time layers,
    as in the released ``.bin`` files: the original program loads the file as the state of its module. A plain model has
    neither, and transformers' ``CLIPModel.from_pretrained`` loads the folder.

    The folder is made if it does not exist, and files of an earlier call are replaced. Parameters may be split over
    devices.

    Raises:
      UserError: the folder cannot be written.
    """
    folder = Path(folder)
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": clip.projection_dim,
        "text_config": flax.core.unfreeze(clip.text_config),
        "vision_config": flax.core.unfreeze(clip.vision_config),
    }
    try:
        write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_params(folder / WEIGHTS, params, dtype=dtype, prefix="model." if clip.step_aware else "")
    except OSError as error:
        raise UserError(f"Folder {folder} cannot be written ({error.strerror or error}); choose another.") from error
