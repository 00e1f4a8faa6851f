"""Files that appear whole or not at all, and where those lie that are of use only."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from spo_jax.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block ends well: a reader never sees half of one.

    The folder is made if it is not there. The file's mode follows the umask, whoever writes it (safetensors: 0600).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(b"")
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, see ``atomic_write``."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, 64 digits; a file that has not changed is read once in a process."""
    found = path.stat()
    return _sha256(path.resolve(), found.st_size, found.st_mtime_ns)


@functools.cache
def _sha256(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


@contextlib.contextmanager
def saying_where(path: str | Path, option: str = "--out") -> Iterator[None]:
    """Turns what goes wrong with writing ``path``, which ``option`` names, into one sentence (UserError)."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{option}={path} cannot be written ({reason}); choose another place.") from error


def check_place(path: str | Path, option: str = "--out") -> None:
    """Makes sure that ``atomic_write`` can write ``path``, and makes its folder; before anything expensive.

    Raises:
      UserError: it is a folder or below a file, its name is too long, or its folder cannot be made or written to.
    """
    if "\0" in str(path):
        raise UserError(f"{option}={str(path)!r} is no name that a file can have; choose another one.")
    with saying_where(path, option):
        number = errno.EISDIR if Path(path).is_dir() else errno.ENOTDIR if Path(path).parent.is_file() else 0
        if number:
            raise OSError(number, os.strerror(number))
        with contextlib.suppress(_OnlyATry), atomic_write(path):
            raise _OnlyATry


class _OnlyATry(Exception):
    """Leaves ``atomic_write`` before the file takes its place."""


def cache_folder() -> Path | None:
    """Where things are kept that save time, in ``XDG_CACHE_HOME`` or the home; None for a user who has neither."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "spo_jax" if os.path.isabs(base) else None
