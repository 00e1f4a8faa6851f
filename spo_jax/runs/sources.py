"""Where models and data of a run come from, for its model card: names as links, and what is known of licences."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import PurePosixPath
from typing import NamedTuple

from spo_jax.errors import UserError
from spo_jax.formats.hub import PREFIX, find_file
from spo_jax.formats.remote import RemoteName, parse_remote

_MAX_CARD_BYTES = 2**20
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE_LINE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", re.ASCII | re.MULTILINE)


class Licence(NamedTuple):
    """The hub's identifier, such as ``mit``, or "" where none can be named; and what a reader is told."""

    identifier: str
    words: str


_APACHE, _MIT = Licence("apache-2.0", "Apache-2.0"), Licence("mit", "MIT")
_EMOJI_MODEL = Licence("apache-2.0", "Apache-2.0; learned from Noto Color Emoji (SIL OFL 1.1)")
# As the repositories' pages have it, of models and data that the configs name.
_LICENCES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Licence("creativeml-openrail-m", "CreativeML OpenRAIL-M"),
    "stabilityai/stable-diffusion-xl-base-1.0": Licence("openrail++", "CreativeML Open RAIL++-M"),
    "madebyollin/sdxl-vae-fp16-fix": _MIT,
    "SPO-Diffusion-Models/Step-Aware_Preference_Models": _APACHE,
    "yuvalkirstain/PickScore_v1": Licence("", "its page names none; its code is under MIT"),
    "openai/clip-vit-large-patch14": _MIT,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _MIT,
    "xswu/HPSv2": _APACHE,
    "christophschuhmann/improved-aesthetic-predictor": _APACHE,
    "RockeyCoss/SPO": _MIT,
    "AIDC-AI/Diffusion-SDPO": _APACHE,
}


def source_of(name: str) -> RemoteName | None:
    """The remote name that a name is, if it has its commit; None for all others."""
    try:
        remote = parse_remote(name)
    except UserError:
        return None
    return remote if remote is not None and remote.pinned else None


def url_of(remote: RemoteName) -> str:
    """The page that shows a repository, or a folder or a file of it, at its commit."""
    kind = "blob" if PurePosixPath(remote.inside).suffix else "tree"
    inside = f"/{urllib.parse.quote(remote.inside)}" if remote.inside else ""
    return f"{remote.page()}/{kind}/{remote.revision}{inside}"


def licence_of(name: str) -> Licence:
    """The licence of a model or a data file: what is known of it, or what the README of its folder says.

    A README is read only where it is on this machine already, in a local folder or in the hub's cache.
    """
    source = source_of(name)
    if name.startswith(PREFIX):
        return _APACHE if name.startswith(f"{PREFIX}prompts/") else _EMOJI_MODEL
    if source is not None and source.repo in _LICENCES:
        return _LICENCES[source.repo]
    card = find_file(name, "README.md")
    if card is not None and card.stat().st_size <= _MAX_CARD_BYTES:
        front_matter = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
        if front_matter and (line := _LICENCE_LINE.search(front_matter[1])):
            return Licence(line[1], line[1])
    return Licence("", "not known" if source is None else "not known; see its page")
