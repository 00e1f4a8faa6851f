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

import huggingface_hub
from huggingface_hub import constants, errors

from spo_jax.errors import UserError, first_line
from spo_jax.files import write_text
from spo_jax.formats.remote import COMMIT, RemoteName, choose_files
from spo_jax.formats.transfer import NO_SPACE, alone, patiently, transfer

_GITHUB = "https://raw.githubusercontent.com"
_SILENCE = 30.0  # seconds without an answer after which there is no network
_MAX_LISTING_BYTES = 64 * 2**20
_UNSAFE_PATH = re.compile(r"^/|(^|/)\.\.?(/|$)|[\\\0]|[^/]{256}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}")
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

    Raises UserError if there is no such repository or revision; Unreachable if neither hub nor cache can tell.
    """
    if remote.pinned:
        return remote.revision
    known = _repository(remote) / "refs" / (remote.revision or "main")
    try:
        place = {"revision": remote.revision or None, "repo_type": remote.kind}
        info = _ask(remote, lambda api: api.repo_info(remote.repo, timeout=_SILENCE, **place))
    except Unreachable:
        commit = known.read_text(encoding="utf-8").strip() if known.is_file() else ""
        if COMMIT.fullmatch(commit):
            return commit
        raise
    if not COMMIT.fullmatch(str(info.sha)):
        raise UserError(f"{page(remote)} gives {info.sha!r} as its commit; is HF_ENDPOINT a hub?")
    with contextlib.suppress(OSError):  # what huggingface_hub looks up without network
        write_text(known, info.sha)
    return str(info.sha)


def list_files(
    remote: RemoteName, *, variant: str = "", weights: bool = True, network: bool = True
) -> list[RemoteFile] | None:
    """The files of ``remote``, pinned to a commit, that are read here; see ``choose_files`` for the other arguments.

    ``network=False`` asks no server; the result is None then if the files are not known.

    Raises UserError if there is no such repository, commit or file, or it is not accessible; Unreachable if a server
    has to be asked, and cannot be.
    """
    if remote.site == "github":
        digest = f"sha256:{remote.sha256}" if remote.sha256 else ""
        return [RemoteFile(remote.inside, _size_on_github(remote) if network else -1, digest)]
    if (listing := _listing(remote, network)) is None:
        return None
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
    path = local_path(remote, file.path)
    return file.size if file.size >= 0 else path.stat().st_size if path.is_file() else 0


def partial_bytes(remote: RemoteName, file: RemoteFile) -> int:
    """The bytes that an interrupted transfer has left of the file."""
    part = _incomplete(remote, file)
    return part.stat().st_size if part.is_file() else 0


def page(remote: RemoteName) -> str:
    """The address of the repository's page, on the hub that ``HF_ENDPOINT`` names."""
    return remote.page(re.sub(r"//[^/@]*@", "//", constants.ENDPOINT))  # without a password


def address(remote: RemoteName, path: str) -> str:
    """The URL of a file's content."""
    if remote.site == "github":
        base = os.environ.get("GITHUB_RAW_ENDPOINT") or _GITHUB
        return f"{base.rstrip('/')}/{remote.repo}/{remote.revision}/{path}"
    return huggingface_hub.hf_hub_url(remote.repo, path, repo_type=remote.kind, revision=remote.revision)


def cache_folder(remote: RemoteName) -> Path:
    """The nearest existing folder above the place of its files: what tells how much space there is."""
    folder = _own_folder() if remote.site == "github" else _repository(remote)
    return next(path for path in (folder, *folder.parents) if path.is_dir())


# --------------------------------------------------------------------------------------------------------- transfers
def fetch(remote: RemoteName, file: RemoteFile, *, again: bool = False) -> Path:
    """Fetches one file, unless it is here, and verifies its size and digest before it gets its name.

    An interrupted transfer is resumed, and content that is here under another name is used. Several processes may ask
    for the same file: one fetches it. With ``again`` the file here is damaged, and stays until the new one has come.

    Raises UserError if it is not accessible, has another size or checksum, or cannot be written; Unreachable if the
    server cannot be asked.
    """
    target, incomplete, blob = local_path(remote, file.path), _incomplete(remote, file), _blob(remote, file)
    if blob is None:
        lock = _own_folder() / "locks" / f"{hashlib.sha256(str(target).encode()).hexdigest()}.lock"
    else:  # the one that huggingface_hub takes, so that its commands wait as well
        lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
    with _one_sentence(remote, file.path), alone(lock, f"{file.path} of {remote.repo}"):
        if is_here(remote, file) and not (again and fault_of(target, file)):
            return target
        incomplete.parent.mkdir(parents=True, exist_ok=True)
        if blob is None or not blob.is_file() or fault_of(blob, file) is not None:
            headers = {} if remote.site == "github" else huggingface_hub.utils.build_hf_headers()
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
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                target.symlink_to(os.path.relpath(blob, target.parent))
            except OSError:  # a file system without links
                os.replace(blob, target)
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
        found = hashlib.file_digest(content, lambda: digest).hexdigest()
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
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.3g} MB" if size >= 1e6 else f"{size / 1e3:.3g} kB"


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


def _listing(remote: RemoteName, network: bool) -> dict[str, RemoteFile] | None:
    """The files of a commit by path, as they were listed before, or as the hub lists them now if it may be asked."""
    kept = _own_folder() / "listings" / _repository(remote).name / f"{remote.revision}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):  # then it is asked for again
        if kept.stat().st_size <= _MAX_LISTING_BYTES:
            known = [RemoteFile(*entry) for entry in json.loads(kept.read_text(encoding="utf-8"))]
            if known and all(map(_is_safe, known)):
                return {file.path: file for file in known}
    if not network:
        return None

    def ask(api: Any) -> list[Any]:
        place = {"revision": remote.revision, "repo_type": remote.kind}
        api.repo_info(remote.repo, timeout=_SILENCE, **place)  # fails soon without network
        return list(api.list_repo_tree(remote.repo, recursive=True, **place))

    files = []
    for entry in _ask(remote, ask):
        if hasattr(entry, "size"):  # a folder has none
            large = getattr(entry, "lfs", None)
            file = RemoteFile(entry.path, entry.size, f"sha256:{large.sha256}" if large else f"git:{entry.blob_id}")
            if not _is_safe(file):
                what = f"{file.path!r}, {file.size!r} bytes, {file.digest!r}"
                raise UserError(f"{page(remote)} lists a file {what}; no hub does.")
            files.append(file)
    if files:
        with contextlib.suppress(OSError):  # without it the hub is asked again
            write_text(kept, json.dumps([dataclasses.astuple(file) for file in files]))
    return {file.path: file for file in files}


def _is_safe(file: RemoteFile) -> bool:
    """Whether a listed path and digest may become names of files here: a mirror may send anything."""
    texts = isinstance(file.path, str) and isinstance(file.digest, str) and type(file.size) is int and file.size >= 0
    return texts and not _UNSAFE_PATH.search(file.path) and _DIGEST.fullmatch(file.digest) is not None


def _ask(remote: RemoteName, request: Callable[[Any], _T]) -> _T:
    """Asks the hub; patient with a busy one."""
    with _one_sentence(remote):
        return patiently(lambda: request(huggingface_hub.HfApi()))


def _size_on_github(remote: RemoteName) -> int:
    path = local_path(remote, remote.inside)
    if path.is_file():
        return path.stat().st_size

    def ask() -> int:
        headers = {"Accept-Encoding": "identity"}
        url = address(remote, remote.inside)
        response = huggingface_hub.get_session().head(url, headers=headers, follow_redirects=True, timeout=_SILENCE)
        if response.status_code in (405, 501):  # a mirror without it
            return -1
        huggingface_hub.utils.hf_raise_for_status(response)
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
            status, see, again = response.status_code, f"see {page(remote)}", "run the same command again"
            busy = f"The server cannot give {what} now ({status}); {again} later: it goes on then."
            missing = f"There is no {what} at {remote.revision or 'its default branch'} ({status}); {see}."
            refused = f"The server refuses {what} ({status}); {see}, and check HF_TOKEN or `hf auth login`."
            many = f"The server has had too many requests for {what} (429); {again} in some minutes."
            refusals = {401: refused, 403: refused, 404: missing, 410: missing, 429: many}
            raise UserError(refusals.get(status, busy)) from error
        if isinstance(error, errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        if isinstance(error, json.JSONDecodeError):
            reason = "what came is no answer of a hub: a login page, or a proxy?"
        message = f"{what} could not be fetched ({reason}); run the same command again with network."
        raise Unreachable(message, reason) from error
