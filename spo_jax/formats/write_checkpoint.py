"""A whole pipeline into one file, in the original layout of Stable Diffusion: for ComfyUI, A1111, kohya's tools."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from spo_jax.diffusion.schedule import FILE, make_schedule
from spo_jax.errors import UserError
from spo_jax.formats import names, original_configs
from spo_jax.formats.json_files import Json
from spo_jax.formats.original_layout import LAYOUTS, V_PREDICTION, ZERO_SNR, Original, originals
from spo_jax.formats.parts import scheduler_of
from spo_jax.formats.pipeline_files import PipelineFiles, write_configs
from spo_jax.formats.safetensors_io import fetch_array, write_arrays
from spo_jax.formats.single_file import CLIP_VOCABULARY, config_folder
from spo_jax.formats.stored import StoredArray
from spo_jax.models.clip import CLIPTextTransformer

_GELU = "gelu"  # the activation of open_clip's text encoders; others have quick_gelu


class _Entry(NamedTuple):
    """A key of the file, and the parameters of a part that make it: one, or queries, keys and values."""

    part: str
    paths: tuple[tuple[str, ...], ...]
    original: Original


def write_checkpoint(
    out: Path, files: PipelineFiles, parts: Mapping[str, Callable[[], PyTree]], *, dtype: DTypeLike
) -> Path | None:
    """Writes a pipeline with other parameters of some parts; the file appears complete or not at all.

    One part of the pipeline is in memory at a time, and a converted copy of one array.

    Args:
      out: the ``.safetensors`` file.
      files: of the pipeline.
      parts: by name, functions that give the parameters of the parts that are not to be as in the pipeline. Each is
        called after all checks, when its part is written.
      dtype: of everything in the file.

    Returns:
      The folder that got the pipeline's configs, because a reader of the file alone would take others; mostly None.

    Raises:
      UserError: the pipeline is not complete or has no place in this layout, or a value is not finite in ``dtype``.
    """
    kind = "SD2" if files.configs["text_encoder"].get("hidden_act") == _GELU else "SD1"
    kind = "SDXL" if files.is_xl else kind
    shapes = {part: files.network(part, np.float32)[1] for part in files.configs}
    entries = dict(itertools.chain.from_iterable(_entries(kind, part, shapes[part]) for part in LAYOUTS[kind]))
    flat = {part: flax.traverse_util.flatten_dict(tree) for part, tree in shapes.items()}
    markers = _markers(files.scheduler)
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(markers, (0,))
    for key, entry in entries.items():
        ours = flat[entry.part][entry.paths[0]].shape
        sizes[key] = entry.original.shape(names.torch_shape(entry.paths[0], ours))
    configs = config_folder(out) if _needs_configs(files, kind, sizes, out) else None
    if configs is not None and configs.exists():
        raise UserError(
            f"{configs}, which would hold the configs of {out}, exists; remove it, or choose another --out."
        )

    def arrays() -> Iterator[np.ndarray]:
        yield from (np.zeros(0, dtype) for _ in markers)
        for part, group in itertools.groupby(entries.items(), key=lambda item: item[1].part):
            values = flax.traverse_util.flatten_dict(parts[part]() if part in parts else files.read(part, np.float32))
            for key, entry in group:
                yield _converted(key, entry, values, dtype)

    metadata = original_configs.model_spec(kind, out.stem, files.prediction_type, files.image_size)
    every = {key: jax.ShapeDtypeStruct(shape, dtype) for key, shape in sizes.items()}
    write_arrays(out, every, arrays(), metadata=metadata)
    if configs is not None:
        write_configs(files, configs)
    return configs


# ------------------------------------------------------------------------------------------------------------ pieces
def _entries(kind: str, part: str, shapes: PyTree) -> list[tuple[str, _Entry]]:
    """The keys of a part in the file, each with what it is made of, sorted."""
    joined: dict[str, list[tuple[tuple[str, ...], Original]]] = {}
    for path, original in originals(kind, part, shapes).items():
        joined.setdefault(original.key, []).append((path, original))
    entries = []
    for key, pieces in sorted(joined.items()):
        pieces.sort(key=lambda piece: piece[1].third or 0)
        entries.append((key, _Entry(part, tuple(path for path, _ in pieces), pieces[0][1])))
    return entries


def _converted(key: str, entry: _Entry, values: Mapping[tuple[str, ...], ArrayLike], dtype: DTypeLike) -> np.ndarray:
    """An array of the file in its layout and dtype; UserError if a value is not finite in it."""
    pieces = [names.to_torch(path, fetch_array(values[path])) for path in entry.paths]
    array = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if entry.original.transposed:
        array = array.T
    with np.errstate(over="ignore"):
        converted = np.asarray(array, dtype)
    if not np.isfinite(converted.astype(np.float32)).all():
        if np.isfinite(array).all():
            raise UserError(
                f"{key!r} has values beyond the range of {np.dtype(dtype)}; write with --dtype=bfloat16 or float32."
            )
        raise UserError(f"{key!r} has values that are not finite; the model or the adapters are damaged.")
    return converted


def _markers(scheduler: Json) -> list[str]:
    """Keys without values, by which ComfyUI and A1111 know what the UNet predicts."""
    marked = {
        V_PREDICTION: scheduler.get("prediction_type") == "v_prediction",
        ZERO_SNR: bool(scheduler.get("rescale_betas_zero_snr")),
    }
    return [key for key, is_so in marked.items() if is_so]


def _needs_configs(files: PipelineFiles, kind: str, sizes: Mapping[str, tuple[int, ...]], out: Path) -> bool:
    """Whether somebody who has the file alone would take another pipeline for it."""
    arrays = {key: StoredArray(out, 0, np.dtype(np.float32), shape) for key, shape in sizes.items()}
    try:
        configs = original_configs.pipeline_configs(out, kind, arrays, files.prediction_type)
        del configs["index"]
        schedules = [
            make_schedule({**scheduler_of(config, out, sdxl=kind == "SDXL"), FILE: ""}, 20)
            for config in (configs.pop("scheduler"), files.scheduler)
        ]
        same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), *schedules)
    except (UserError, ValueError):
        return True
    vocabularies = {files.configs[part].get("vocab_size", CLIP_VOCABULARY) for part in configs if "text" in part}
    assumed = dataclasses.replace(files, configs=configs)
    return (
        not all(jax.tree.leaves(same))
        or vocabularies != {CLIP_VOCABULARY}
        or any(_computes(assumed, part) != _computes(files, part) for part in configs)
    )


def _computes(files: PipelineFiles, part: str) -> nn.Module:
    """What a part's config says about what it computes; equal if two compute the same."""
    if part == "unet":
        return files.network(part, np.float32)[0]
    if part == "vae":
        return files.network(part, np.float32)[0].clone(sample_size=0)
    tower = CLIPTextTransformer.from_config(files.configs[part], parent=None)
    largest = tower.vocab_size - 1  # as the end of the text, it is what 2 stands for
    end = 2 if tower.eos_token_id == largest else tower.eos_token_id
    projected = tower.projection_dim if part == "text_encoder_2" else 0
    return tower.clone(eos_token_id=end, projection_dim=projected)
