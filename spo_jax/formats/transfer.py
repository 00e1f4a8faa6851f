"""One HTTP transfer into a file: it resumes the last one, and refuses whatever is not the file.

on disk           answer           what is done
nothing           200              written from the start
a part            206, the rest    appended
a part            200, all of it   written from the start: the server knows no ranges
any               another length, a web page, more than the file has: refused, and the file on disk stays
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub import errors

from spo_jax.errors import UserError, notice

TRIES = 5  # of one request or file, as long as nothing comes
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LONGEST_WAIT = 300.0  # seconds that a server may ask for
_SILENCE = 30.0  # seconds without an answer after which a connection counts as broken
_BLOCK = 2**20
_T = TypeVar("_T")


class NotTheFile(UserError):
    """The server's answer is something else than the file that was asked for."""


def transfer(url: str, headers: dict[str, str], target: Path, size: int, name: str) -> None:
    """Appends the content at ``url`` to ``target`` until it is whole; a connection that breaks is made again.

    Args:
      url: of the content.
      headers: of the request, without a range.
      target: holds the bytes that came before.
      size: in bytes; -1 if it is not known, then the server has to tell it.
      name: for the progress bar, which is shown on a terminal only.

    Raises:
      NotTheFile: something else is sent.
      Exception: of the HTTP library, after the last try, or if the server refuses.
      OSError: the file cannot be written.
    """
    failures = 0
    while True:
        before = target.stat().st_size if target.is_file() else 0
        if before > size >= 0:
            os.truncate(target, 0)
            before = 0
        if before == size:
            target.touch()
            return
        try:
            _append(url, headers, target, before, size, name)
            return
        except Exception as error:  # the HTTP library's own kinds differ between versions
            if _status(error) == 416 and before:  # it was whole, or is not what the server has now
                os.truncate(target, 0)
            elif not _passes(error):
                raise
            grown = target.is_file() and target.stat().st_size > before
            failures = 0 if grown else failures + 1
            if failures >= TRIES:
                raise
            wait = _wait(error, failures)
            if wait is None:
                raise
        time.sleep(wait)


def _append(url: str, headers: dict[str, str], target: Path, before: int, size: int, name: str) -> None:
    from huggingface_hub.utils import get_session, hf_raise_for_status, tqdm

    # Without compression, so that lengths and ranges are of the file itself.
    headers = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={before}-"} if before else {})
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=_SILENCE) as response:
        hf_raise_for_status(response)
        given = response.headers
        packed = given.get("Content-Encoding", "identity") != "identity"
        length = int(given["Content-Length"]) if given.get("Content-Length", "").isdigit() and not packed else -1
        first = before if response.status_code == 206 else 0
        if first and not given.get("Content-Range", "").startswith(f"bytes {first}-"):
            raise NotTheFile(f"{url} gave another range than was asked for.")
        whole = size if size >= 0 else first + length
        if length >= 0 and first + length != whole:
            raise NotTheFile(f"{url} gave {first + length} bytes instead of {whole}: a login page, or a proxy?")
        if length < 0 and size < 0:
            raise NotTheFile(f"{url} does not tell how long it is, so nobody could tell whether it came whole.")
        if given.get("Content-Type", "").startswith("text/html"):
            raise NotTheFile(f"{url} gave a web page: a login page, or a proxy?")
        shown = name if len(name) <= 40 else f"...{name[-37:]}"
        progress = tqdm(total=whole, initial=first, desc=shown, unit="B", unit_scale=True, disable=None)
        with target.open("r+b" if first else "wb") as content, progress:
            content.seek(first)
            for block in response.iter_bytes(_BLOCK):
                first += len(block)
                if first > whole:
                    raise NotTheFile(f"{url} gave more than the {whole} bytes of the file.")
                content.write(block)
                progress.update(len(block))
        if first < whole:
            raise ConnectionResetError(f"the connection ended after {first} of {whole} bytes")


def patiently(act: Callable[[], _T]) -> _T:
    """``act()``, again after a while if the server says that it is busy (429, 5xx)."""
    for failures in range(1, TRIES):
        try:
            return act()
        except Exception as error:
            status = _status(error)
            wait = _wait(error, failures)
            if wait is None or not (status == 429 or 500 <= status < 600):
                raise
            time.sleep(wait)
    return act()


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Holds a lock that other processes respect; says so if one of them has it for longer."""
    from huggingface_hub.utils import WeakFileLock

    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(WeakFileLock(lock, timeout=5))
        except TimeoutError:
            notice(f"another process is fetching {what}; waiting for it.")
            held.enter_context(WeakFileLock(lock))
        yield


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _passes(error: Exception) -> bool:
    """Whether a transfer that failed may go on: after a broken connection or a busy server, not after a refusal."""
    if status := _status(error):
        return status == 429 or status >= 500
    if isinstance(error, UserError | errors.OfflineModeIsEnabled):
        return False
    return isinstance(error, ConnectionError) or getattr(error, "errno", None) is None


def _wait(error: Exception, failures: int) -> float | None:
    """Seconds to wait before the next try; None if the server asks for more than anyone would wait."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    wait = float(asked) if asked.isdigit() else min(2.0**failures, 10.0)
    if status := _status(error):
        notice(f"the server is busy ({status}); asking again in {wait:.0f} s.")
    return wait if wait <= _LONGEST_WAIT else None
