"""Rows of activations under content hashes, in memory or in a memory-mapped file, up to a number of bytes."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SEGMENT = 64 * 2**20  # bytes by which the store grows
_ALIGNED = 64  # every row begins at a multiple of it, so that its bytes can be read as any dtype


@dataclass(frozen=True)
class _Row:
    segment: int
    begin: int
    shape: torch.Size
    dtype: torch.dtype


class RowStore:
    """Tensors that are written once and read often.

    Args:
        max_bytes: how much may be kept.
        folder: where to put a file that is mapped into memory; it has no name, so nothing is left behind, not even
            by a crash. Default: in RAM.
        dtype: the precision that rows are kept in; default as they come.

    Raises:
        OSError: when a row is put and the disk is full.

    Example:
        >>> store = RowStore(max_bytes=1000)
        >>> store.put(b"a", torch.ones(2, 3))
        True
        >>> store.get(b"a").shape
        torch.Size([2, 3])
    """

    def __init__(self, max_bytes: int, folder: str | Path | None = None, dtype: torch.dtype | None = None) -> None:
        self.max_bytes, self.dtype = max_bytes, dtype
        self.bytes = 0  # of all rows
        self._rows: dict[bytes, _Row] = {}
        self._segments: list[Tensor] = []
        self._free = 0  # in the last segment
        self._file: Any = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def size_of(self, row: Tensor) -> int:
        """Return the bytes that a row takes here."""
        size = row.numel() * (self.dtype or row.dtype).itemsize
        return -(-size // _ALIGNED) * _ALIGNED

    def put(self, key: bytes, row: Tensor) -> bool:
        """Keep a row that is not kept yet; return False where there is no room for it."""
        if key in self._rows:
            return True
        size = self.size_of(row)
        if self.bytes + size > self.max_bytes:
            return False
        if self._free < size:
            self._grow(max(size, min(_SEGMENT, self.max_bytes - self.bytes)))
        segment = self._segments[-1]
        place = _Row(len(self._segments) - 1, len(segment) - self._free, row.shape, self.dtype or row.dtype)
        self._view(place).copy_(row.detach())
        self._rows[key] = place
        self._free -= size
        self.bytes += size
        return True

    def get(self, key: bytes) -> Tensor:
        """Return a view of a row, on the CPU; not to be written to."""
        return self._view(self._rows[key])

    def close(self) -> None:
        """Forget every row, and give the file back."""
        self._rows.clear()
        self._segments.clear()
        self.bytes = self._free = 0
        if self._file is not None:
            self._file.close()

    def _view(self, row: _Row) -> Tensor:
        size = row.shape.numel() * row.dtype.itemsize
        return self._segments[row.segment][row.begin : row.begin + size].view(row.dtype).view(row.shape)

    def _grow(self, size: int) -> None:
        size = -(-size // _ALIGNED) * _ALIGNED
        # validation may run in inference mode, and what is made there could not be read in training
        with torch.inference_mode(False):
            if self._file is None:
                self._segments.append(torch.empty(size, dtype=torch.uint8))
            else:
                begin = os.fstat(self._file.fileno()).st_size
                begin = -(-begin // _ALIGNED) * _ALIGNED
                if hasattr(os, "posix_fallocate"):  # an error now, not a bus error at the first write
                    os.posix_fallocate(self._file.fileno(), begin, size)
                mapped = np.memmap(self._file, dtype=np.uint8, mode="r+", offset=begin, shape=(size,))
                self._segments.append(torch.from_numpy(mapped))
        self._free = size
