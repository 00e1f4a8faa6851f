"""A diffusers pipeline folder with another UNet, complete or not at all."""

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
from spo_jax.checkpoints.single_file import unpacked
from spo_jax.errors import UserError

INDEX = "model_index.json"
# Parts that a pipeline may do without; diffusers then wants null in their place.
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


def check_output_folder(out: str | Path) -> None:
    """Refuses to write a folder where something is already."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} exists and is not an empty folder; choose another name.")


def write_pipeline(out: str | Path, source: str | Path, unet_params: Any, *, dtype: Any = np.float32) -> None:
    """Writes the pipeline of ``source`` with the given UNet parameters; everything else is copied.

    Copied is what ``model_index.json`` names, and no weight file of the old UNet in whatever format. A component that
    the installed diffusers or transformers does not have is named in a warning: that version cannot load the folder.

    Args:
      out: the new folder; it may exist if it is empty.
      source: a diffusers pipeline folder, or a single file, whose other parts are written in the dtype that they have.
      unet_params: for ``source/unet/config.json``.
      dtype: of the written UNet.

    Raises:
      UserError: ``out`` is not empty or cannot be written, or ``source`` is not complete.
    """
    out, source = Path(out).absolute(), Path(source)
    check_output_folder(out)
    if source.is_file():
        with unpacked(source, out) as folder:
            return write_pipeline(out, folder, unet_params, dtype=dtype)
    index = read_json(source / INDEX)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, part in index.items():
            # Parts are [library, class]; the other entries are settings.
            if not isinstance(part, list) or name == "unet":
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
        (temporary / "unet").mkdir()
        shutil.copyfile(source / "unet" / "config.json", temporary / "unet" / "config.json")
        write_params(temporary / "unet" / "diffusion_pytorch_model.safetensors", unet_params, dtype=dtype)
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
