"""Arrays that still lie in a file: their shapes are known, their values are read one array at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from spo_jax.errors import UserError


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

    def read(self) -> np.ndarray:
        """Its values, in memory of their own. The file is read, not mapped: a mapped file would stay resident.

        Raises:
          UserError: the file has become shorter, or cannot be read any more.
        """
        count = int(np.prod(self.shape, dtype=object))
        if self.strides is not None and count:
            count = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        try:
            flat = np.fromfile(self.file, np.uint8, count * self.dtype.itemsize, offset=self.offset)
        except OSError as error:
            raise UserError(f"Weight file {self.file} cannot be read ({error}).") from error
        if flat.size != count * self.dtype.itemsize:
            raise UserError(f"Weight file {self.file} is truncated; download or copy it again.")
        values = flat.view(self.dtype)
        if self.strides is None or not count:
            return values.reshape(self.shape)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)
