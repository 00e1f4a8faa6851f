"""Pairs as two folders of pictures: what people make by hand, and what trainers of LoRAs have on their disks.

my_pairs/prompt.txt                one caption for all pairs, unless
my_pairs/chosen/a fox_01.png       the better picture of a pair has its own,
my_pairs/chosen/a fox_01.txt       in a file of its name
my_pairs/rejected/a fox_01.jpg     the worse picture, under the same name
"""

from __future__ import annotations

import codecs
import collections
import os
import re
from collections.abc import Iterator
from pathlib import Path

from spo_jax.data.own_files import Source, inside, read_file, read_picture
from spo_jax.data.records import MAX_CAPTION_BYTES, Record
from spo_jax.errors import UserError

CHOSEN, REJECTED, PROMPT = "chosen", "rejected", "prompt.txt"
_KINDS = (".png", ".jpg", ".jpeg", ".webp")
_MAX_FILES = 4_000_000  # in one of the folders
_NUMBER = re.compile(r"([_-]\d+|\s*\(\d+\))$")  # a fox_01, a fox-2, a fox (3)


def is_pair_folder(folder: Path) -> bool:
    """Whether the folder has one of the two, so that ``open_pair_folder`` can say what is missing."""
    return (folder / CHOSEN).is_dir() or (folder / REJECTED).is_dir()


def open_pair_folder(folder: Path) -> Source:
    """The pairs of pictures of the same name in ``chosen/`` and ``rejected/``, by name; labels are 1 and 0.

    The caption is what stands in ``chosen/NAME.txt``, else in ``prompt.txt``, else it is the name itself, without a
    number at its end and with spaces for underscores.

    Raises:
      UserError: a folder, the pictures or the other picture of a pair is missing; there are two pictures of a name;
        ``prompt.txt`` is no caption; there is no caption at all; a file leads out of the folder.
    """
    chosen, rejected = _pictures(folder, CHOSEN), _pictures(folder, REJECTED)
    if not chosen and not rejected:
        raise UserError(f"Folder {folder} has no pictures in {CHOSEN}/ and {REJECTED}/; put {_listed()} files there.")
    if alone := sorted(chosen.keys() ^ rejected.keys()):
        here, there = (CHOSEN, REJECTED) if alone[0] in chosen else (REJECTED, CHOSEN)
        raise UserError(
            f"Folder {folder} has {len(alone)} without a partner of the same name, such as {here}/"
            f"{(chosen | rejected)[alone[0]]}, which {there}/ lacks; add the partners, or remove the pictures."
        )
    prompt, names = _prompt(folder), sorted(chosen)
    captions = {name: _caption(folder, name, prompt) for name in names}
    counts = collections.Counter(captions.values())

    def read() -> Iterator[Record]:
        for name in names:
            yield {
                "caption": captions[name],
                "image_0": read_picture(folder, f"{CHOSEN}/{chosen[name]}"),
                "image_1": read_picture(folder, f"{REJECTED}/{rejected[name]}"),
                "label_0": 1.0,
                "label_1": 0.0,
                "has_label": True,
                "num_example_per_prompt": counts[captions[name]],
            }

    return Source(len(names), read)


def _pictures(folder: Path, part: str) -> dict[str, str]:
    """The file names of the pictures in a part of the folder, by their names without ending."""
    if not (folder / part).is_dir():
        raise UserError(f"Folder {folder} has no {part}/; it needs {CHOSEN}/ and {REJECTED}/ with pictures in both.")
    files: list[str] = []
    try:
        with os.scandir(folder / part) as entries:
            for number, entry in enumerate(entries):
                if number >= _MAX_FILES:
                    raise UserError(f"Folder {folder / part} has more than {_MAX_FILES} files; split it.")
                if entry.name.lower().endswith(_KINDS) and not entry.name.startswith("."):
                    files.append(entry.name)
    except OSError as error:
        raise UserError(f"Folder {folder / part} cannot be read ({error.strerror}); check its permissions.") from error
    found: dict[str, str] = {}
    for file in sorted(files):
        _check_inside(folder, f"{part}/{file}")
        name = file.rpartition(".")[0]
        if name in found:
            raise UserError(f"Folder {folder / part} has {found[name]} and {file}; leave one picture of each name.")
        found[name] = file
    return found


def _check_inside(folder: Path, file: str) -> None:
    if inside(folder, file) is None:
        raise UserError(f"File {folder / file} is a link that leads out of {folder}; put the file itself there.")


def _prompt(folder: Path) -> bytes | None:
    """The caption of all pairs; None without the file."""
    _check_inside(folder, PROMPT)
    content = read_file(folder, PROMPT, MAX_CAPTION_BYTES + 1)
    if content is None:
        return None
    wanted = "it must hold one line of UTF-8 text, the caption of all pairs"
    if len(content) > MAX_CAPTION_BYTES:
        raise UserError(f"File {folder / PROMPT} is longer than {MAX_CAPTION_BYTES} bytes; {wanted}.")
    try:
        text = _stripped(content).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"File {folder / PROMPT} is not UTF-8 ({error.reason}); {wanted}.") from error
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    if len(lines) != 1:
        what = f"has {len(lines)} lines" if lines else "is empty"
        each = f" (captions of their own stand in {CHOSEN}/NAME.txt beside NAME.png)" if lines else ""
        raise UserError(f"File {folder / PROMPT} {what}; {wanted}{each}.")
    return lines[0].encode("utf-8")


def _caption(folder: Path, name: str, prompt: bytes | None) -> bytes:
    beside = f"{CHOSEN}/{name}.txt"
    _check_inside(folder, beside)
    # What is wrong with it, the loader counts as a fault of the record.
    if (content := read_file(folder, beside, MAX_CAPTION_BYTES + 1)) is not None:
        return _stripped(content)
    if prompt is not None:
        return prompt
    caption = _NUMBER.sub("", name).replace("_", " ").strip()
    if not any(character.isalpha() for character in caption):
        raise UserError(
            f"Folder {folder}: the picture {name!r} has no caption, and its name is none; write one for all into "
            f"{PROMPT}, or its own into {beside}."
        )
    return os.fsencode(caption)


def _stripped(content: bytes) -> bytes:
    return content.removeprefix(codecs.BOM_UTF8).strip()


def _listed() -> str:
    return f"{', '.join(_KINDS[:-1])} or {_KINDS[-1]}"
