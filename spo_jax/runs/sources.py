"""Where models and data of a run come from, for its model card: names as links, and what is known of licences."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from spo_jax.errors import UserError
from spo_jax.formats.hub import PREFIX, find_file
from spo_jax.formats.remote import parse_remote

_MAX_CARD_BYTES = 2**20
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_LICENCE_LINE = re.compile(r"^license:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$", re.ASCII | re.MULTILINE)


class Source(NamedTuple):
    """What a name such as ``org/name@commit/inside`` stands for, and the page that shows it."""

    repo: str
    commit: str
    inside: str
    url: str
    on_hub: bool


class Licence(NamedTuple):
    """The hub's identifier, such as ``mit``, or "" where none can be named; and what a reader is told."""

    identifier: str
    words: str


_OPENRAIL_M = Licence("creativeml-openrail-m", "CreativeML OpenRAIL-M")
_OPENRAIL_PP = Licence("openrail++", "CreativeML Open RAIL++-M")
_APACHE, _MIT = Licence("apache-2.0", "Apache-2.0"), Licence("mit", "MIT")
_EMOJI_MODEL = Licence("apache-2.0", "Apache-2.0; learned from Noto Color Emoji (SIL OFL 1.1)")
# As the repositories' pages have it, of models and data that the configs name.
_LICENCES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _OPENRAIL_M,
    "stabilityai/stable-diffusion-xl-base-1.0": _OPENRAIL_PP,
    "madebyollin/sdxl-vae-fp16-fix": _MIT,
    "SPO-Diffusion-Models/Step-Aware_Preference_Models": _APACHE,
    "yuvalkirstain/PickScore_v1": Licence("", "its page names none; its code is under MIT"),
    "openai/clip-vit-large-patch14": _MIT,
    "RockeyCoss/SPO": _MIT,
    "AIDC-AI/Diffusion-SDPO": _APACHE,
}


def source_of(name: str) -> Source | None:
    """The repository behind a remote name (see ``formats/remote.py``) that has its commit; None for all others."""
    try:
        remote = parse_remote(name)
    except UserError:
        return None
    if remote is None or not remote.pinned:
        return None
    kind = "blob" if PurePosixPath(remote.inside).suffix else "tree"  # a file's page or a folder's
    url = f"{remote.page()}/{kind}/{remote.revision}"
    url += f"/{urllib.parse.quote(remote.inside)}" if remote.inside else ""
    return Source(remote.repo, remote.revision, remote.inside, url, remote.site == "hub")


def licence_of(name: str) -> Licence:
    """The licence of a model or a data file: what is known of it, or what the README of its folder says.

    A README is read only where it is on this machine already, in a local folder or in the hub's cache.
    """
    source = source_of(name)
    if name.startswith(PREFIX):
        return _APACHE if name.startswith(f"{PREFIX}prompts/") else _EMOJI_MODEL
    if source is not None and source.repo in _LICENCES:
        return _LICENCES[source.repo]
    identifier = _licence_in(find_file(name, "README.md"))
    if identifier:
        return Licence(identifier, identifier)
    return Licence("", "not known" if source is None else "not known; see its page")


def _licence_in(card: Path | None) -> str:
    """``license`` in the YAML at the top of a README, or ""."""
    if card is None or card.stat().st_size > _MAX_CARD_BYTES:
        return ""
    front_matter = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    line = _LICENCE_LINE.search(front_matter[1]) if front_matter else None
    return line[1] if line else ""
