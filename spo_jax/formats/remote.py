"""Names of files on the Hugging Face hub and on GitHub, as a config or a command gives them.

    org/name@<40 digits>[/path]                     a repository of the Hugging Face hub, or a folder or file in it
    org/name[@branch or tag][/path]                 the same; the commit is looked up once and written down
    datasets/org/name@...                           a data set of the hub
    github:owner/repo@<40 digits>/path              one file of a GitHub repository
    ...#sha256=<64 digits>                          behind a file: what its content must be

A commit never changes, so a run that names one can be repeated. Nothing here reads a file or the network.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from spo_jax.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = re.compile(
    r"(?P<kind>datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/pr/\d+|[^/@#]*)(?:/(?P<inside>[^#]+)|/)?)?"
    r"(?:#sha256=(?P<sha256>[^#]*))?"
)
_GITHUB = re.compile(
    r"github:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@#]*))?(?:/(?P<inside>[^#]+))?(?:#sha256=(?P<sha256>[^#]*))?"
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_FILE_SUFFIXES = (*_WEIGHT_SUFFIXES, ".json", ".jsonl", ".txt", ".csv", ".tsv", ".parquet")
_WEIGHT_FILE = re.compile(
    r"(?:model|pytorch_model|diffusion_pytorch_model)(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
)
_CONFIGS = ("*.json", "*.txt")
# Parts of published pipelines that are never read here.
_UNUSED = ("safety_checker/*", "feature_extractor/*", "image_encoder/*", "vae_1_0/*")


@dataclasses.dataclass(frozen=True)
class RemoteName:
    """A repository and what of it is meant.

    ``site`` is "hub" or "github"; ``kind`` of a hub's repository is "model" or "dataset". ``revision`` is a commit, a
    branch or a tag, ``inside`` a folder or a file in the repository, and ``sha256`` that file's checksum; if empty,
    they stand for the default branch, the whole repository, and an unknown checksum.
    """

    site: str
    repo: str
    revision: str
    inside: str = ""
    sha256: str = ""
    kind: str = "model"

    @property
    def pinned(self) -> bool:
        """Whether it names a commit."""
        return COMMIT.fullmatch(self.revision) is not None

    @property
    def is_file(self) -> bool:
        """Whether it names one file, by its suffix."""
        return PurePosixPath(self.inside).suffix in _FILE_SUFFIXES

    def __str__(self) -> str:
        site = "github:" if self.site == "github" else "datasets/" if self.kind == "dataset" else ""
        revision = f"@{self.revision}" if self.revision else ""
        inside = f"/{self.inside}" if self.inside else ""
        return f"{site}{self.repo}{revision}{inside}" + (f"#sha256={self.sha256}" if self.sha256 else "")

    def page(self, hub: str = "https://huggingface.co") -> str:
        """The address of the repository's page."""
        if self.site == "github":
            return f"https://github.com/{self.repo}"
        return f"{hub}/datasets/{self.repo}" if self.kind == "dataset" else f"{hub}/{self.repo}"


def is_weight_file(name: str) -> bool:
    """Whether a path, here or elsewhere, names one file of weights, by its suffix."""
    return PurePosixPath(name.partition("#")[0]).suffix in _WEIGHT_SUFFIXES


def parse_remote(name: str) -> RemoteName | None:
    """The remote name that ``name`` is; None if it can only be a local path.

    Raises:
      UserError: it is one, but leads out of its repository, or its commit or checksum is not written in full.
    """
    github = name.startswith("github:")
    match = (_GITHUB if github else _HUB).fullmatch(name)
    if github and match is None:
        raise UserError(f"{name!r} is not understood; write github:owner/repo@<40 digits>/path of a file.")
    if match is None or any(part.startswith(".") for part in match["repo"].split("/")):
        return None
    if not github and match["revision"] is None and PurePosixPath(match["repo"]).suffix in _FILE_SUFFIXES:
        return None  # a file of the user's own, in a folder
    inside = match["inside"] or ""
    remote = RemoteName(
        site="github" if github else "hub",
        repo=match["repo"],
        revision=_lower(match["revision"] or ""),
        inside=str(PurePosixPath(inside)) if inside else "",
        sha256=_lower(match["sha256"] or ""),
        kind="dataset" if not github and match["kind"] else "model",
    )
    if ".." in PurePosixPath(inside).parts or PurePosixPath(inside).is_absolute() or ".." in remote.revision:
        raise UserError(f"{name!r} names a path outside its repository.")
    if match["sha256"] is not None and not re.fullmatch(r"[0-9a-f]{64}", remote.sha256):
        raise UserError(f"{name!r}: behind #sha256= stand the 64 hexadecimal digits of a file's checksum.")
    if remote.sha256 and not remote.is_file:
        raise UserError(f"{name!r}: a checksum is of one file; name it, as in {remote.repo}@{remote.revision}/FILE.")
    if github and not (remote.pinned and remote.is_file):
        raise UserError(
            f"{name!r} must name one file at a commit, as in github:{remote.repo}@<40 digits>/prompts.json; commits "
            f"are listed at https://github.com/{remote.repo}/commits."
        )
    return remote


def _lower(digits: str) -> str:
    """Hexadecimal digits in lower case; a branch or a tag stays as it is."""
    return digits.lower() if re.fullmatch(r"[0-9A-Fa-f]{40}|[0-9A-Fa-f]{64}", digits) else digits


def choose_files(remote: RemoteName, paths: Iterable[str], *, variant: str = "", weights: bool = True) -> list[str]:
    """The files among ``paths``, all of a repository, that are read here: configs, tokenizers and weights, never code.

    For a file that file, and the configs beside it if it holds weights. For a folder its configs and, in each folder
    that has any, the weights: safetensors, or PyTorch's ``.bin`` where there are none; of the ``variant`` (such as
    ``"fp16"``), or without one where that is not there. ``weights=False`` leaves weights out.
    """
    paths = sorted(path for path in paths if not any(fnmatch.fnmatchcase(path, pattern) for pattern in _UNUSED))
    place = PurePosixPath(remote.inside or ".")

    def matching(folder: PurePosixPath, *patterns: str) -> list[str]:
        whole = [str(folder / pattern) for pattern in patterns]
        return [path for path in paths if any(fnmatch.fnmatchcase(path, pattern) for pattern in whole)]

    if remote.is_file:
        beside = place.suffix in _WEIGHT_SUFFIXES and remote.site == "hub"
        configs = [path for path in matching(place.parent, *_CONFIGS) if PurePosixPath(path).parent == place.parent]
        return sorted({str(place), *(configs if beside else [])})
    chosen = set(matching(place, *_CONFIGS))
    if weights:
        folders = {PurePosixPath(path).parent for path in paths}
        for folder in (place, *(folder for folder in folders if folder.parent == place)):
            chosen.update(_weights_in(folder, paths, variant))
        adapters = [
            matching(place, f"pytorch_lora_weights.{kind}", f"adapter_model.{kind}") for kind in ("safetensors", "bin")
        ]
        chosen.update(adapters[0] or adapters[1])
    return sorted(chosen)


def _weights_in(folder: PurePosixPath, paths: Iterable[str], variant: str) -> list[str]:
    """The weights of a model, whole or in shards, as ``formats/weights.py`` chooses them; no other checkpoints."""
    forms: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        match = _WEIGHT_FILE.fullmatch(PurePosixPath(path).name) if PurePosixPath(path).parent == folder else None
        if match:
            forms.setdefault((match["variant"] or "", match["kind"]), []).append(path)
    variants = {name for name, _ in forms}
    only = variants if len(variants) == 1 else ()  # files of one variant alone are read without asking for it
    wanted = ((name, kind) for name in (variant, "", *only) for kind in ("safetensors", "bin"))
    return next((forms[form] for form in wanted if form in forms), [])
