"""Fetches files of the Hugging Face hub and of GitHub into the hub's cache; resumes transfers, and verifies files.

    HF_HOME/hub/models--org--name/snapshots/<commit>/...    files of the hub, in its own layout (links to blobs/<hash>)
    HF_HOME/spo_jax/github/owner/repo/<commit>/...          files of GitHub
    HF_HOME/spo_jax/listings/...                            which files a commit of the hub has

``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_OFFLINE`` and the usual proxy variables are
respected, as huggingface_hub does it; ``GITHUB_RAW_ENDPOINT`` names a mirror of raw.githubusercontent.com.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants, errors

from spo_jax.errors import UserError, first_line
from spo_jax.files import write_text
from spo_jax.formats.remote import RemoteName, choose_files
from spo_jax.formats.transfer import NO_SPACE, alone, patiently, transfer

_GITHUB = "https://raw.githubusercontent.com"
_SILENCE = 30.0  # seconds without an answer after which there is no network
_MAX_LISTING_BYTES = 64 * 2**20
_BLOCK = 2**20
_UNSAFE_PATH = re.compile(r"^/|(^|/)\.\.?(/|$)|[\\\0]|[^/]{256}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


class Unreachable(UserError):
    """A server could not be asked, or may not be; ``reason`` says why, in a few words."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size in bytes, -1 if unknown, and a digest, "sha256:..." or "git:..." or empty.

    Git's digest is the SHA-1 of a header and the content; the hub tells it of small files, and SHA-256 of large ones.
    """

    path: str
    size: int = -1
    digest: str = ""


# ------------------------------------------------------------------------------------------------------ what there is
def commit_of(remote: RemoteName) -> str:
    """The commit that a name of the hub means now; without network the one that the cache holds for its branch.

    Raises:
      UserError: there is no such repository or revision.
      Unreachable: the hub cannot be asked, and the cache does not know.
    """
    if remote.pinned:
        return remote.revision
    known = _repository(remote) / "refs" / (remote.revision or "main")
    try:
        place = {"revision": remote.revision or None, "repo_type": remote.kind}
        info = _ask(remote, lambda api: api.repo_info(remote.repo, timeout=_SILENCE, **place))
    except Unreachable:
        commit = known.read_text(encoding="utf-8").strip() if known.is_file() else ""
        if _COMMIT.fullmatch(commit):
            return commit
        raise
    if not _COMMIT.fullmatch(str(info.sha)):
        raise UserError(f"{page(remote)} gives {info.sha!r} as its commit; is HF_ENDPOINT a hub?")
    with contextlib.suppress(OSError):  # what huggingface_hub looks up without network
        write_text(known, info.sha)
    return str(info.sha)


def list_files(
    remote: RemoteName, *, variant: str = "", weights: bool = True, network: bool = True
) -> list[RemoteFile] | None:
    """The files of ``remote``, pinned to a commit, that are read here; see ``choose_files`` for the other arguments.

    ``network=False`` asks no server; the result is None then if the files are not known.

    Raises:
      UserError: the repository, the commit or the file does not exist or is not accessible.
      Unreachable: a server has to be asked, and cannot be.
    """
    if remote.site == "github":
        digest = f"sha256:{remote.sha256}" if remote.sha256 else ""
        return [RemoteFile(remote.inside, _size_on_github(remote) if network else -1, digest)]
    listing = _known_listing(remote)
    if listing is None:
        if not network:
            return None
        listing = _ask_listing(remote)
    chosen = choose_files(remote, listing, variant=variant, weights=weights)
    if not chosen or chosen[0] not in listing:
        there = ", ".join(sorted(listing)[:5]) or "no files"
        raise UserError(
            f"{page(remote)} has nothing at {remote.revision} that is read here as {remote.inside or 'a model'}; "
            f"it has {there}{', ...' if len(listing) > 5 else ''}."
        )
    files = [listing[path] for path in chosen]
    if remote.sha256:
        named = listing[remote.inside]
        if named.digest.startswith("sha256:") and named.digest != f"sha256:{remote.sha256}":
            raise UserError(
                f"File {remote.inside} of {remote.repo} has the checksum {named.digest.removeprefix('sha256:')} on the "
                f"hub, but {remote.sha256} was asked for; mend the one behind #sha256=, or the commit."
            )
        files = [dataclasses.replace(f, digest=f"sha256:{remote.sha256}") if f == named else f for f in files]
    return files


def local_path(remote: RemoteName, path: str) -> Path:
    """Where a file of a pinned repository is, or would be, on this machine."""
    if remote.site == "github":
        return _own_folder() / "github" / remote.repo / remote.revision / path
    return _repository(remote) / "snapshots" / remote.revision / path


def is_here(remote: RemoteName, file: RemoteFile) -> bool:
    """Whether the file is on this machine with the right size and, if its name has a checksum, with that one."""
    path = local_path(remote, file.path)
    with _one_sentence(remote, file.path):
        if not path.is_file():
            return False
        found = path.stat()
        if file.size not in (-1, found.st_size):
            return False
        summed = remote.sha256 and file.path == remote.inside
        return not summed or _fault_of_unchanged(path, file, found.st_mtime_ns) is None


def size_of(remote: RemoteName, file: RemoteFile) -> int:
    """Its size as its server has it; if that is unknown, the size of what is here of it."""
    return file.size if file.size >= 0 else _size(local_path(remote, file.path))


def partial_bytes(remote: RemoteName, file: RemoteFile) -> int:
    """The bytes that an interrupted transfer has left of the file."""
    return _size(_incomplete(remote, file))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def page(remote: RemoteName) -> str:
    """The address of the repository's page, on the hub that ``HF_ENDPOINT`` names."""
    return remote.page(re.sub(r"//[^/@]*@", "//", constants.ENDPOINT))  # without a password


def address(remote: RemoteName, path: str) -> str:
    """The URL of a file's content."""
    from huggingface_hub import hf_hub_url

    if remote.site == "github":
        base = os.environ.get("GITHUB_RAW_ENDPOINT") or _GITHUB
        return f"{base.rstrip('/')}/{remote.repo}/{remote.revision}/{path}"
    return hf_hub_url(remote.repo, path, repo_type=remote.kind, revision=remote.revision)


def cache_folder(remote: RemoteName) -> Path:
    """The nearest existing folder above the place of its files: what tells how much space there is."""
    folder = _own_folder() if remote.site == "github" else _repository(remote)
    return next(path for path in (folder, *folder.parents) if path.is_dir())


# --------------------------------------------------------------------------------------------------------- transfers
def fetch(remote: RemoteName, file: RemoteFile, *, again: bool = False) -> Path:
    """Fetches one file, unless it is here, and verifies its size and digest before it gets its name.

    An interrupted transfer is resumed, and content that is here under another name is used. Several processes may ask
    for the same file: one fetches it. With ``again`` the file here is damaged, and stays until the new one has come.

    Raises:
      UserError: it is not accessible, has another size or checksum, or cannot be written.
      Unreachable: the server cannot be asked.
    """
    from huggingface_hub.utils import build_hf_headers

    target, incomplete, blob = local_path(remote, file.path), _incomplete(remote, file), _blob(remote, file)
    with _one_sentence(remote, file.path), alone(_lock(remote, file), f"{file.path} of {remote.repo}"):
        if is_here(remote, file) and not (again and fault_of(target, file)):
            return target
        incomplete.parent.mkdir(parents=True, exist_ok=True)
        if blob is None or not blob.is_file() or fault_of(blob, file) is not None:
            headers = {} if remote.site == "github" else build_hf_headers()
            transfer(address(remote, file.path), headers, incomplete, file.size, file.path)
            if (fault := fault_of(incomplete, file)) is not None:
                incomplete.unlink()
                other = " or for a slip in the digits behind #sha256=" if remote.sha256 else ""
                raise UserError(
                    f"File {file.path} of {remote.repo} did not come as it should be ({fault}); what came was thrown "
                    "away: run the same command again, and if that repeats, look for a proxy or mirror that changes it"
                    f"{other}."
                )
            os.replace(incomplete, blob or target)
        if blob is not None:
            _link(target, blob)
    return target


def fault_of(path: Path, file: RemoteFile) -> str | None:
    """What is wrong with the content at ``path``, if anything is; without size and digest nothing can be."""
    size = path.stat().st_size
    if file.size not in (-1, size):
        return f"{size} bytes instead of {file.size}"
    kind, _, expected = file.digest.partition(":")
    if not expected:
        return None
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    return None if found == expected else f"checksum {found} instead of {expected}"


@functools.cache
def _fault_of_unchanged(path: Path, file: RemoteFile, _changed: int) -> str | None:
    return fault_of(path, file)


def check_space(wanted: Sequence[tuple[RemoteName, RemoteFile]]) -> None:
    """Raises UserError if the files do not fit the disks they go to."""
    disks: dict[int, list[tuple[RemoteName, RemoteFile]]] = {}
    for remote, file in wanted:
        disks.setdefault(cache_folder(remote).stat().st_dev, []).append((remote, file))
    for there in disks.values():
        folder, size = cache_folder(there[0][0]), bytes_to_fetch(there)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(
                f"{in_bytes(size)} have to be fetched, but {folder} has {in_bytes(free)} free; free some, or set "
                "HF_HOME to a folder on another disk."
            )


def bytes_to_fetch(wanted: Sequence[tuple[RemoteName, RemoteFile]]) -> int:
    """What is left to transfer of the files; content that several share is counted once."""
    return sum({_incomplete(r, file): max(0, file.size - partial_bytes(r, file)) for r, file in wanted}.values())


def in_bytes(size: int) -> str:
    """A size for people: 604 kB, 5.48 GB."""
    if size < 1000:
        return f"{size} byte{'' if size == 1 else 's'}"
    amount, units = size / 1000, ["kB", "MB", "GB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.2f} GB" if units[0] == "GB" else f"{amount:.3g} {units[0]}"


# ------------------------------------------------------------------------------------------------------------ pieces
def _at_home(folder: str) -> Path:
    if folder.startswith("~"):  # as huggingface_hub leaves it for a user without a home
        raise UserError("There is no home folder to keep what is fetched; set HF_HOME to a folder of yours.")
    return Path(folder)


def _own_folder() -> Path:
    return _at_home(constants.HF_HOME) / "spo_jax"


def _repository(remote: RemoteName) -> Path:
    return _at_home(constants.HF_HUB_CACHE) / f"{remote.kind}s--{remote.repo.replace('/', '--')}"


def _blob(remote: RemoteName, file: RemoteFile) -> Path | None:
    """Where the hub's cache keeps the content, by its hash; None for GitHub's."""
    return _repository(remote) / "blobs" / file.digest.rpartition(":")[2] if remote.site == "hub" else None


def _incomplete(remote: RemoteName, file: RemoteFile) -> Path:
    whole = _blob(remote, file) or local_path(remote, file.path)
    return whole.with_name(whole.name + ".spo_jax.incomplete")


def _lock(remote: RemoteName, file: RemoteFile) -> Path:
    # For files of the hub the one that huggingface_hub takes, so that its commands wait as well.
    if (blob := _blob(remote, file)) is not None:
        return blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
    return _own_folder() / "locks" / f"{hashlib.sha256(str(local_path(remote, file.path)).encode()).hexdigest()}.lock"


def _link(target: Path, blob: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(os.path.relpath(blob, target.parent))
    except OSError:  # a file system without links
        os.replace(blob, target)


def _listing_file(remote: RemoteName) -> Path:
    return _own_folder() / "listings" / _repository(remote).name / f"{remote.revision}.json"


def _known_listing(remote: RemoteName) -> dict[str, RemoteFile] | None:
    path = _listing_file(remote)
    try:
        if path.stat().st_size > _MAX_LISTING_BYTES:
            return None
        files = [RemoteFile(*entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return None  # asked for again
    return {file.path: file for file in files} if files and all(map(_is_safe, files)) else None


def _ask_listing(remote: RemoteName) -> dict[str, RemoteFile]:
    def ask(api: Any) -> list[Any]:
        place = {"revision": remote.revision, "repo_type": remote.kind}
        api.repo_info(remote.repo, timeout=_SILENCE, **place)  # fails soon without network
        return list(api.list_repo_tree(remote.repo, recursive=True, **place))

    files = []
    for entry in _ask(remote, ask):
        if hasattr(entry, "size"):  # a folder has none
            large = getattr(entry, "lfs", None)
            digest = f"sha256:{large.sha256}" if large else f"git:{entry.blob_id}"
            file = RemoteFile(entry.path, entry.size, digest)
            if not _is_safe(file):
                raise UserError(
                    f"{page(remote)} lists a file {entry.path!r}, {file.size!r} bytes, {digest!r}; no hub does."
                )
            files.append(file)
    if files:
        with contextlib.suppress(OSError):  # without it the hub is asked again
            write_text(_listing_file(remote), json.dumps([dataclasses.astuple(file) for file in files]))
    return {file.path: file for file in files}


def _is_safe(file: RemoteFile) -> bool:
    """Whether a listed path and digest may become names of files here: a mirror may send anything."""
    texts = isinstance(file.path, str) and isinstance(file.digest, str) and type(file.size) is int and file.size >= 0
    return texts and not _UNSAFE_PATH.search(file.path) and _DIGEST.fullmatch(file.digest) is not None


def _ask(remote: RemoteName, request: Callable[[Any], _T]) -> _T:
    """Asks the hub; patient with a busy one."""
    from huggingface_hub import HfApi

    with _one_sentence(remote):
        return patiently(lambda: request(HfApi()))


def _size_on_github(remote: RemoteName) -> int:
    from huggingface_hub.utils import get_session, hf_raise_for_status

    path = local_path(remote, remote.inside)
    if path.is_file():
        return path.stat().st_size

    def ask() -> int:
        headers = {"Accept-Encoding": "identity"}
        url = address(remote, remote.inside)
        response = get_session().head(url, headers=headers, follow_redirects=True, timeout=_SILENCE)
        if response.status_code in (405, 501):  # a mirror without it
            return -1
        hf_raise_for_status(response)
        told = response.headers.get("Content-Length", "")
        packed = response.headers.get("Content-Encoding", "identity") != "identity"
        return int(told) if told.isdigit() and not packed else -1

    with _one_sentence(remote, remote.inside):
        return patiently(ask)


@contextlib.contextmanager
def _one_sentence(remote: RemoteName, path: str = "") -> Iterator[None]:
    """Turns what a request or a transfer raises into one sentence for the user."""
    what = f"{path} of {remote.repo}" if path else remote.repo
    sentences: dict[type[Exception], str] = {
        errors.GatedRepoError: f"{remote.repo} is gated: open {page(remote)}, accept its terms, and set HF_TOKEN to a "
        "token of yours (or log in with `hf auth login`).",
        errors.RevisionNotFoundError: f"{remote.repo} has no revision {remote.revision or 'main'}; its commits are "
        f"listed at {page(remote)}/commits/main.",
        errors.RepositoryNotFoundError: f"There is no repository {remote.repo} at {page(remote)}, or it is private, "
        "and nothing of that name is here; check the name, and for a private one set HF_TOKEN to a token of yours (or "
        "log in with `hf auth login`).",
        errors.HFValidationError: f"{remote.repo} is no name of a repository on the hub, and nothing of that name is "
        "here.",
    }
    try:
        yield
    except UserError:
        raise
    except tuple(sentences) as error:
        raise UserError(next(text for kind, text in sentences.items() if isinstance(error, kind))) from error
    except Exception as error:  # network, proxy, authentication and disk fail in many ways
        response, number = getattr(error, "response", None), getattr(error, "errno", None)
        reason = first_line(error).rstrip(".") or type(error).__name__
        if number in NO_SPACE:
            raise UserError(
                f"{what} does not fit into {cache_folder(remote)} ({os.strerror(number)}); free some space, or set "
                "HF_HOME to a folder on another disk, and run the same command again: it goes on where it stopped."
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or number == errno.EROFS:
            raise UserError(
                f"{what} cannot be read or written in {cache_folder(remote)} ({reason}); "
                "set HF_HOME to a folder of yours."
            ) from error
        if response is not None:
            raise UserError(_refusal(remote, what, response.status_code)) from error
        if isinstance(error, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        if isinstance(error, json.JSONDecodeError):
            reason = "what came is no answer of a hub: a login page, or a proxy?"
        message = f"{what} could not be fetched ({reason}); run the same command again with network."
        raise Unreachable(message, reason) from error


def _refusal(remote: RemoteName, what: str, status: int) -> str:
    if status in (401, 403):
        return f"The server refuses {what} ({status}); see {page(remote)}, and check HF_TOKEN or `hf auth login`."
    if status in (404, 410):
        return f"There is no {what} at {remote.revision or 'its default branch'} ({status}); see {page(remote)}."
    if status == 429:
        return f"The server has had too many requests for {what} (429); run the same command again in some minutes."
    return f"The server cannot give {what} now ({status}); run the same command again later: it goes on then."
