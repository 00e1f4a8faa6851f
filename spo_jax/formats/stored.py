"""Arrays that still lie in a file: their shapes are known, their values are read one array at a time."""

from __future__ import annotations

import dataclasses
import math
import mmap
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from spo_jax.errors import UserError

_LARGE = 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """Where one array lies in an uncompressed file.

    ``offset`` counts bytes from the start of the file; ``strides`` count elements, and None means row-major order.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def rows(self, begin: int, end: int) -> StoredArray:
        """Rows ``begin`` to ``end - 1`` of it."""
        row = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        offset = self.offset + begin * row * self.dtype.itemsize
        return dataclasses.replace(self, offset=offset, shape=(end - begin, *self.shape[1:]))

    def transposed(self) -> StoredArray:
        """The array with its axes in the opposite order."""
        strides = self.strides or tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        return dataclasses.replace(self, shape=self.shape[::-1], strides=strides[::-1])

    def without_last_ones(self, ndim: int) -> StoredArray:
        """The array as one of ``ndim`` axes, if those behind them have the length 1; otherwise itself."""
        if any(n != 1 for n in self.shape[ndim:]):
            return self
        return dataclasses.replace(self, shape=self.shape[:ndim], strides=self.strides and self.strides[:ndim])

    def read(self) -> np.ndarray:
        """Its values, in memory of their own. The file is read, not mapped: a mapped file would stay resident.

        Raises:
          UserError: the file has become shorter, or cannot be read any more.
        """
        count = math.prod(self.shape)
        if self.strides is not None and count:
            count = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                values = empty((count,), self.dtype)
                complete = file.readinto(values.view(np.uint8).data) == values.nbytes
        except OSError as error:
            raise UserError(f"Weight file {self.file} cannot be read ({error}).") from error
        if not complete:
            raise UserError(f"Weight file {self.file} is truncated; download or copy it again.")
        if self.strides is None or not count:
            return values.reshape(self.shape)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)


def empty(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An array of any content, whose memory goes back to the system when it is dropped.

    A large one has pages of its own, because the allocator keeps what it once got, and the temporary copies of a whole
    checkpoint would pile up there. Pages are also aligned, so that JAX's CPU backend takes them over without a copy.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _LARGE:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)
