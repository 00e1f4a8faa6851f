"""Where the images of an evaluation lie, and their export in the layouts that other benchmarks read.

All of an export is checked before its first file is written, and the folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from spo_jax.errors import UserError
from spo_jax.files import saying_where

STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2's benchmark, in the order of its table
_LONGEST_NAME = 255  # bytes of a file's name


class Pictures(NamedTuple):
    """Images of one model: ``files`` by place of the prompt and of the seed."""

    prompts: list[str]
    files: list[list[Path]]


def image_path(out: str | Path, model: str, prompt_id: int, seed: int) -> Path:
    """Where an image of an evaluation lies: ``images/MODEL/PPPPP_S.png``."""
    return Path(out) / "images" / model / f"{prompt_id:05d}_{seed}.png"


def find_pictures(out: str | Path, model: str, seeds: Sequence[int]) -> Pictures:
    """The images of a model in ``out``, a folder that ``python -m spo_jax.evaluate`` has written.

    Raises:
      UserError: there is no list of prompts or no such model, or images are missing.
    """
    out = Path(out)
    try:
        prompts = json.loads((out / "prompts.json").read_text(encoding="utf-8"))
        if not (isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts)):
            raise ValueError("it is no list of texts")
    except (OSError, ValueError) as error:
        raise UserError(f"{out / 'prompts.json'} cannot be read as the prompts of an evaluation ({error}).") from error
    if not (out / "images" / model).is_dir():
        there = sorted(path.name for path in (out / "images").glob("*") if path.is_dir())
        raise UserError(f"{out} has no images of model {model!r}, only of {', '.join(there) or 'none'}.")
    files = [[image_path(out, model, i, seed) for seed in seeds] for i in range(len(prompts))]
    missing = [path for row in files for path in row if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(prompts) * len(seeds)} images of model {model} are missing, the first "
            f"{missing[0]}; finish the evaluation, or name the seeds that it has."
        )
    return Pictures(prompts, files)


def export_hpsv2(
    out: str | Path,
    model: str,
    folder: str | Path,
    *,
    seed: int = 0,
    per_style: int = 800,
    styles: Sequence[str] = STYLES,
) -> Path:
    """One image of each prompt as HPSv2's benchmark reads them: ``<folder>/<style>/<idx:05d>.jpg``, JPEG quality 75.

    HPSv2 takes every name in ``folder`` for a style. So the prompts, ``<style>.json`` as its ``data_path`` has them, go
    to a folder beside it, which is named ``<folder>_prompts``.

    Args:
      out: folder of the evaluation; its prompts are those of the benchmark, style after style.
      model: name.
      folder: to write, named after the model, as HPSv2 takes its name from it.
      seed: which image of a prompt.
      per_style: prompts of a style.
      styles: names, in the order of the prompts.

    Returns:
      The folder of prompts.

    Raises:
      UserError: there are other numbers of prompts, images are missing, or a folder is there already.
    """
    folder = Path(folder)
    pictures = find_pictures(out, model, [seed])
    if len(pictures.prompts) != len(styles) * per_style:
        raise UserError(
            f"HPSv2's benchmark has {len(styles) * per_style} prompts, {per_style} of each of {', '.join(styles)}, but "
            f"{out} has {len(pictures.prompts)}; generate from its prompts, in this order."
        )
    prompts = folder.with_name(f"{folder.name}_prompts")
    with _new_folder(prompts) as beside, _new_folder(folder) as inside:
        for i, style in enumerate(styles):
            (inside / style).mkdir()
            texts = pictures.prompts[i * per_style : (i + 1) * per_style]
            (beside / f"{style}.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
            for k in range(per_style):
                picture = _open(pictures.files[i * per_style + k][0])
                picture.save(inside / style / f"{k:05d}.jpg", quality=75)
    return prompts


def export_geneval(
    out: str | Path,
    model: str,
    folder: str | Path,
    *,
    metadata: Sequence[Mapping[str, Any]],
    seeds: Sequence[int] = (0, 1, 2, 3),
) -> None:
    """GenEval's layout: ``<folder>/<idx:05d>/metadata.jsonl`` and ``samples/<k:04d>.png``.

    Args:
      out: folder of the evaluation, with the prompts of ``metadata`` in its order.
      model: name.
      folder: to write.
      metadata: of each prompt, the lines of GenEval's ``evaluation_metadata.jsonl``; each has its ``prompt``.
      seeds: of the images, four of them.

    Raises:
      UserError: there are other prompts or not four seeds, images are missing, or the folder is there already.
    """
    if len(set(seeds)) != 4:
        raise UserError(f"GenEval takes 4 images of a prompt, not those of the seeds {_named(seeds)}.")
    pictures = find_pictures(out, model, seeds)
    if len(pictures.prompts) != len(metadata):
        raise UserError(
            f"GenEval's metadata are of {len(metadata)} prompts, but {out} has {len(pictures.prompts)}; generate from "
            "the prompts of the metadata."
        )
    for i, (prompt, line) in enumerate(zip(pictures.prompts, metadata, strict=True)):
        if line.get("prompt") != prompt:
            raise UserError(f"Prompt {i} of {out} is {prompt!r}, that of GenEval's metadata {line.get('prompt')!r}.")
    with _new_folder(Path(folder)) as inside:
        for i, line in enumerate(metadata):
            samples = inside / f"{i:05d}" / "samples"
            samples.mkdir(parents=True)
            (samples.parent / "metadata.jsonl").write_text(json.dumps(dict(line)), encoding="utf-8")
            for k, path in enumerate(pictures.files[i]):
                shutil.copyfile(path, samples / f"{k:04d}.png")


def read_geneval_metadata(path: str | Path) -> list[dict[str, Any]]:
    """Reads GenEval's ``evaluation_metadata.jsonl``, one JSON object a line.

    Raises:
      UserError: it is not there or is something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        metadata = [json.loads(line) for line in lines if line.strip()]
        if not metadata or not all(isinstance(line, dict) and "prompt" in line for line in metadata):
            raise ValueError("a line has no prompt")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as GenEval's metadata ({error}).") from error
    return metadata


def export_t2i_compbench(
    out: str | Path, model: str, folder: str | Path, *, seeds: Sequence[int] = tuple(range(10)), images: int = 10
) -> None:
    """T2I-CompBench's layout: ``<folder>/samples/<prompt>_<k:06d>.png``, k counted over all images, prompt by prompt.

    The benchmark reads the prompt from the file's name, up to the first underscore, and orders images by k. So a prompt
    that cannot be a name, or that would be read as another, is refused, not cut: its score would be of another text.

    Args:
      out: folder of the evaluation, with the prompts of one category.
      model: name.
      folder: to write.
      seeds: of the images.
      images: how many of each prompt the benchmark wants.

    Raises:
      UserError: there are other numbers of seeds, a prompt cannot be a name, images are missing, or the folder is there
        already.
    """
    if len(set(seeds)) != images:
        raise UserError(f"T2I-CompBench takes {images} images of a prompt, not those of the seeds {_named(seeds)}.")
    pictures = find_pictures(out, model, seeds)
    for i, prompt in enumerate(pictures.prompts):
        reason = _no_name(prompt)
        if reason:
            raise UserError(f"Prompt {i} of {out}, {prompt!r}, cannot be a file's name of T2I-CompBench: {reason}.")
    with _new_folder(Path(folder)) as inside:
        (inside / "samples").mkdir()
        for i, prompt in enumerate(pictures.prompts):
            for k, path in enumerate(pictures.files[i]):
                shutil.copyfile(path, inside / "samples" / f"{prompt}_{i * images + k:06d}.png")


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image ({error}); generate it again.") from error


def _no_name(prompt: str) -> str:
    """Why a prompt cannot be the beginning of a file's name that is read back to it; "" if it can."""
    if not prompt.strip():
        return "it is empty"
    for sign, name in (("/", "slash"), ("\0", "null"), ("_", "underscore, where the prompt is cut")):
        if sign in prompt:
            return f"it has a {name}" if sign != "_" else f"it has an {name}"
    if prompt.startswith("."):
        return "it begins with a dot, which hides the file"
    length = len(f"{prompt}_000000.png".encode())
    return f"the name would have {length} bytes of at most {_LONGEST_NAME}" if length > _LONGEST_NAME else ""


def _named(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name ``folder`` when the block ends well.

    Raises:
      UserError: there is something of that name that is not an empty folder, or it cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already; remove it, or choose another folder.")
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    with saying_where(folder):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
