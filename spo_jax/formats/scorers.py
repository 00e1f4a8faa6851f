"""Scorers in files: a user's own function, and a preference model as a folder that other programs read too."""

from __future__ import annotations

import importlib
import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

import spo_jax
from spo_jax.errors import UserError
from spo_jax.files import write_text
from spo_jax.formats.safetensors_io import write_params
from spo_jax.models import CLIPModel
from spo_jax.preference.scorers import ImageScorer, make_function_scorer
from spo_jax.types import Tokenizer

_NOT_THE_USERS = re.compile(r"site-packages|^<frozen|" + re.escape(str(Path(spo_jax.__file__).parent)))


def load_function(name: str, key: str = "config.scorer.fn") -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The function ``"my_module:score"``, imported from the working directory or from what is installed. UserError
    if the module or the function is not there, the module does not run, or it is no function."""
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise UserError(f'{key}={name} names no function; write it as "my_module:score".')
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's file, in which anything may fail
        top = module_name.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name in (top, module_name):
            raise UserError(
                f"{key}={name}: there is no module {module_name}; "
                "start in the folder that has its file, or put that folder on PYTHONPATH."
            ) from error
        raise UserError(f"{key}={name}: module {module_name} does not run ({_reason(error)}); mend it.") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "has no function" if function is None else "has something else than a function under the name"
        raise UserError(f"{key}={name}: module {module_name} {what} {function_name}.")
    return function


def function_scorer(
    name: str, *, num_images: int, image_size: tuple[int, int], tokenizer: Tokenizer, key: str = "config.scorer.fn"
) -> ImageScorer:
    """The scorer of a user's function, which is traced on the shapes of a run, without computing anything.

    It takes images float32 [n, H, W, 3], tokens int32 [n, ``tokenizer.model_max_length``] and timesteps int32 [n].
    UserError as ``load_function``; or if JAX cannot trace the function, or its result is not float32 [n].
    """
    scorer = make_function_scorer(load_function(name, key))
    images = jax.ShapeDtypeStruct((num_images, *image_size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((num_images, tokenizer.model_max_length), jnp.int32)
    timesteps = jax.ShapeDtypeStruct((num_images,), jnp.int32)
    try:
        result = jax.eval_shape(scorer.score, {}, images, tokens, timesteps)
    except Exception as error:  # whatever the user's code raises
        raise UserError(
            f"{key}={name} does not run on images {list(images.shape)}, tokens {list(tokens.shape)} and timesteps "
            f"{list(timesteps.shape)} ({_reason(error)}); it takes (images, tokens, timesteps) and is written in "
            "jax.numpy, without values of arrays."
        ) from error
    if not isinstance(result, jax.ShapeDtypeStruct) or (result.shape, result.dtype) != ((num_images,), jnp.float32):
        what = f"{result.dtype} {list(result.shape)}" if isinstance(result, jax.ShapeDtypeStruct) else "no array"
        raise UserError(f"{key}={name} gives {what} for {num_images} pictures; it must give float32 [{num_images}].")
    return scorer


def _reason(error: Exception) -> str:
    """The first line of an error, and where in the user's code it was raised."""
    lines = str(error).splitlines()
    reason = f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
    places = [f for f in traceback.extract_tb(error.__traceback__) if not _NOT_THE_USERS.search(f.filename)]
    return f"{reason}; {Path(places[-1].filename).name}, line {places[-1].lineno}" if places else reason


def write_scorer(folder: str | Path, clip: CLIPModel, params: PyTree, *, dtype: DTypeLike = np.float32) -> None:
    """Writes ``config.json`` and ``model.safetensors``, which ``read_clip`` reads from the folder or from the file.

    The keys are transformers' CLIP names. Those of a step-aware model have the prefix ``model.`` and its time layers,
    as in the released ``.bin`` files: the original program loads the file as the state of its module. A plain model has
    neither, and transformers' ``CLIPModel.from_pretrained`` loads the folder.

    The folder is made if it does not exist, and files of an earlier call are replaced. Parameters may be split over
    devices. UserError if the folder cannot be written.
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
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_params(folder / "model.safetensors", params, dtype=dtype, prefix="model." if clip.step_aware else "")
    except OSError as error:
        raise UserError(f"Folder {folder} cannot be written ({error.strerror or error}); choose another.") from error
