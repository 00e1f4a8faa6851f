"""Models by name: a local path, or a remote name (``remote.py``) that is fetched into the hub's cache if need be.

What is in the cache (``HF_HOME``) needs no network. No code is fetched or run.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import shlex
from pathlib import Path, PurePosixPath

from spo_jax.errors import UserError, notice
from spo_jax.formats import download
from spo_jax.formats.remote import RemoteName, parse_remote

PREFIX = "emoji:"  # of the files of the emoji world, which ship with the package
_EMOJI = Path(__file__).parents[1] / "emoji"
MAX_STRENGTH = 1000  # of adapters; sensible ones are between -2 and 2
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_model(name: str | Path, *, variant: str | None = None, weights: bool = True) -> Path:
    """The local folder or file that ``name``, a local path or a remote name, stands for; fetches what the cache lacks.

    Args:
      name: a remote one without a commit is looked up, and a notice tells the commit.
      variant: of the weight files to fetch, such as ``"fp16"``.
      weights: False fetches configs and tokenizers only.

    Raises:
      UserError: there is no such path or repository, or files are neither in the cache nor to be had.
    """
    remote = remote_of(name)
    if remote is None:
        if not exists(name):
            raise UserError(not_here(str(name)))
        return local(name)
    try:
        remote = pinned(remote)
        files = download.list_files(remote, variant=variant or "", weights=weights, network=False)
        if files is None and not download.local_path(remote, "").is_dir():
            files = download.list_files(remote, variant=variant or "", weights=weights)
        for file in files or ():
            if not download.is_here(remote, file):
                download.fetch(remote, file)
    except download.Unreachable as error:
        raise UserError(
            f"{name} is neither here nor complete in the hub's cache, and it could not be fetched ({error.reason}); "
            f"with network, fetch it with `{fetch_command(remote, variant or '', weights=weights)}`."
        ) from error
    return download.local_path(remote, remote.inside)


def fetched(name: str | Path) -> Path:
    """As ``resolve_model`` for a name with an ``@``; any other is a local path, which need not be there.

    For prompts and adapters, which are mostly local: a slip in a path must not become a stranger's repository.
    """
    return resolve_model(name) if "@" in str(name) and remote_of(name) is not None else local(name)


def remote_of(name: str | Path) -> RemoteName | None:
    """The remote name; None for what is here or can only be a local path, such as ``runs/a``."""
    text = str(name)
    if exists(name) or ("@" not in text and "/" in text and exists(text.partition("/")[0] or "/")):
        return None
    return parse_remote(text)


def with_strength(name: str) -> tuple[str, float]:
    """The name and the strength of adapters: ``("runs/a", 0.7)`` of ``runs/a:0.7``; the strength is 1 by default.

    The part behind the last colon belongs to the name if that is a path that exists, or the part is no number.

    Raises:
      UserError: the strength of a path that is here is no number, or beyond ``MAX_STRENGTH``.
    """
    head, colon, tail = name.rpartition(":")
    if not colon or not head or exists(name):
        return name, 1.0
    try:
        strength = float(tail)
    except ValueError:
        if not exists(head):
            return name, 1.0
        strength = math.nan
    if not abs(strength) <= MAX_STRENGTH:
        raise UserError(
            f"{name!r}: behind the last colon stands the strength, a number such as {head}:0.7, at most {MAX_STRENGTH}."
        )
    return head, strength


def local(name: str | Path) -> Path:
    """A local path; ``emoji:model`` is a folder that ships with the package, and ``~`` is the home folder."""
    text = str(name)
    return _EMOJI / text.removeprefix(PREFIX) if text.startswith(PREFIX) else Path(os.path.expanduser(text))


def exists(name: str | Path) -> bool:
    """Whether there is such a path; False for a name that no path can have."""
    try:
        return local(name).exists()
    except (OSError, ValueError):
        return False


@functools.cache
def pinned(remote: RemoteName) -> RemoteName:
    """The name with the commit that it means now; a notice tells one that was looked up."""
    if remote.pinned:
        return remote
    commit = download.commit_of(remote)
    notice(f"{remote} is at commit {commit}.")
    return dataclasses.replace(remote, revision=commit)


def not_here(name: str) -> str:
    """The sentence for a name that is neither a path nor a remote name."""
    return (
        f"{name!r} does not exist here; give a local path, a repository of the Hugging Face hub at a commit, "
        "org/name@<40 digits>, or a file of GitHub, github:owner/repo@<40 digits>/path."
    )


def fetch_command(remote: RemoteName, variant: str = "", *, weights: bool = True) -> str:
    """The shell command that fetches what a name stands for; it may fetch more than is read."""
    if remote.site == "github":
        place, address = download.local_path(remote, remote.inside), download.address(remote, remote.inside)
        return f"curl --create-dirs -o {shlex.quote(str(place))} {shlex.quote(address)}"
    kind = " --repo-type dataset" if remote.kind == "dataset" else ""
    inside = f" {shlex.quote(remote.inside)}" if remote.is_file else ""
    revision = f" --revision {remote.revision}" if remote.revision else ""
    dot = f".{variant}" if variant else ""
    patterns = ["*.json", "*.txt"]
    patterns += [f"*model{dot}.safetensors", f"*model{dot}-*-of-*.safetensors"] if weights else []
    folder = f"{remote.inside}/" if remote.inside else ""
    include = "" if inside else "".join(f" --include {shlex.quote(folder + pattern)}" for pattern in patterns)
    return f"hf download {remote.repo}{inside}{kind}{revision}{include}"


def repository_of(name: str | Path) -> str | None:
    """``org/name`` of a hub id such as ``org/name@commit``; None if ``name`` is none."""
    remote = parse_remote(str(name))
    return remote.repo if remote is not None and remote.site == "hub" else None


def find_file(name: str | Path, file: str) -> Path | None:
    """A file of a model (see ``resolve_model``) that is here already, in its folder or in the hub's cache, or None."""
    remote = remote_of(name)
    if remote is None:
        return path if (path := local(name) / file).is_file() else None
    import huggingface_hub  # takes a second to import

    inside = str(PurePosixPath(remote.inside or ".") / file)
    found = huggingface_hub.try_to_load_from_cache(remote.repo, inside, revision=remote.revision or None)
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def missing(path: Path, what: str = "File") -> str:
    """The sentence for a file that is not there; if it belongs to the hub's cache, with the command that fetches it."""
    for folder in path.parents:
        if _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots":
            repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
            file = shlex.quote(path.relative_to(folder).as_posix())
            return (
                f"{what} {path} is not in the hub's cache; if {repo} has it, fetch it with "
                f"`hf download {repo} {file} --revision {folder.name}`."
            )
    if path.is_symlink():
        return f"{what} {path} is a link to {os.readlink(path)}, which does not exist; put the file itself there."
    return f"{what} {path} does not exist; is {path.parent} a complete model folder?"
