"""A diffusers pipeline folder with another UNet, also with other text encoders, complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spo_jax.checkpoints.pipeline import read_json
from spo_jax.checkpoints.safetensors_io import write_params
from spo_jax.checkpoints.weights import DIFFUSERS_STEM, TRANSFORMERS_STEM
from spo_jax.errors import UserError

INDEX = "model_index.json"
# Parts that a pipeline may do without; diffusers then wants null in their place.
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


def check_output_folder(out: str | Path) -> None:
    """Refuses to write a folder where something is already."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not an empty folder; choose another name.")


def write_pipeline(
    out: str | Path,
    source: str | Path,
    unet_params: Any,
    *,
    text_encoders: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes the pipeline of ``source`` with the given parameters; everything else is copied.

    Copied is what ``model_index.json`` names, and no weight file of the replaced models in whatever format. A
    component that the installed diffusers or transformers does not have is named in a warning: that version cannot load
    the folder.

    Args:
      out: the new folder; it may exist if it is empty.
      source: a diffusers pipeline folder.
      unet_params: for ``source/unet/config.json``.
      text_encoders: parameters of those that are replaced as well, by name.
      dtype: of the written models.

    Raises:
      UserError: ``out`` is not empty or cannot be written, or ``source`` is not complete.
    """
    out, source = Path(out).absolute(), Path(source)
    check_output_folder(out)
    index = read_json(source / INDEX)
    models = {"unet": (unet_params, DIFFUSERS_STEM)}
    models |= {name: (params, TRANSFORMERS_STEM) for name, params in (text_encoders or {}).items()}
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, part in index.items():
            # Parts are [library, class]; the other entries are settings.
            if not isinstance(part, list) or name in models:
                continue
            if (source / name).is_dir():
                shutil.copytree(source / name, temporary / name)
            elif name in _OPTIONAL:
                index[name] = [None, None]
            elif part[:1] != [None]:
                raise UserError(f"Folder {source / name} does not exist, but {source / INDEX} names it.")
        if index.get("safety_checker") == [None, None]:
            index["requires_safety_checker"] = False
        (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name, (params, stem) in models.items():
            (temporary / name).mkdir()
            shutil.copyfile(source / name / "config.json", temporary / name / "config.json")
            write_params(temporary / name / f"{stem}.safetensors", params, dtype=dtype)
        os.replace(temporary, out)
        for unknown in _unknown_classes(index):
            print(f"spo_jax: warning: {out / INDEX} names {unknown}, which cannot load it.", file=sys.stderr)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written ({error.strerror or error}); choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unknown_classes(index: Mapping[str, Any]) -> list[str]:
    """Classes of the pipeline and its parts that the installed libraries do not have, each with the library."""
    import diffusers  # these take seconds to import, and only what is written needs them
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = [part for part in index.values() if isinstance(part, list) and len(part) == 2]
    named = [("diffusers", index.get("_class_name")), *parts]
    return [
        f"{name}.{kind}, unknown to {name} {libraries[name].__version__}"
        for name, kind in named
        if name in libraries and kind not in dir(libraries[name])
    ]
