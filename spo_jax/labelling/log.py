"""The log of a labelling session: JSON lines that are only ever added to, each on the disk before it counts."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from spo_jax.errors import UserError
from spo_jax.files import saying_where
from spo_jax.formats.json_files import Json


class Log:
    """An open log; ``records`` are those that it had when it was opened.

    One command has it at a time. A last line without an end is of a command that was killed while it wrote; nobody was
    told that it counts, and it is dropped.

    Raises:
      UserError: another command has it open, it cannot be written, or a line is no object.
    """

    def __init__(self, path: Path) -> None:
        with saying_where(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
            except BlockingIOError as error:
                os.close(self._file)
                raise UserError(f"Another command has {path} open; go on there, or end it first.") from error
            content = path.read_bytes()
            _sync_folder(path.parent)
            self._size = content.rfind(b"\n") + 1
            os.ftruncate(self._file, self._size)
        lines = content[: self._size].splitlines()
        self.records = [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]

    def append(self, record: Json) -> None:
        """Adds a record; when this returns, it is on the disk. OSError if it could not be written: then it is not."""
        data = json.dumps(record).encode() + b"\n"
        os.ftruncate(self._file, self._size)  # what an attempt that failed has left
        os.lseek(self._file, self._size, os.SEEK_SET)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file, rest) :]
        os.fsync(self._file)
        self._size += len(data)

    def close(self) -> None:
        """Lets others open it."""
        os.close(self._file)


def _parsed(line: bytes, where: str) -> Json:
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: not a record of labelling ({error}); mend it, or label in another folder."
        ) from error
    return value


def _sync_folder(folder: Path) -> None:
    """A file that is new lasts only when its folder does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
