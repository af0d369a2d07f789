"""One read-only memory-mapped weight file, and the description of a tensor inside it.

GGUF and safetensors differ in their headers and in nothing else that matters here: both are a header and
tensors at byte offsets. The readers parse their header, describe each tensor by a `TensorInfo`, and hand out
views of the mapping; nothing is copied, and the pages of a tensor that has been packed elsewhere can be given
back to the operating system with `drop`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pagoda.base.errors import ModelFileError

__all__ = ["MappedFile", "TensorInfo", "WeightFile", "check_layout"]


class TensorInfo(NamedTuple):
    """Where a tensor lies. `shape` is in numpy order (rows first); `offset` counts bytes from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shard: int = 0


class WeightFile(Protocol):
    """What the loader needs of a model file, whatever its format."""

    path: Path
    tensors: dict[str, TensorInfo]

    def raw(self, name: str) -> np.ndarray: ...

    def array(self, name: str) -> np.ndarray: ...

    def drop(self, name: str) -> None: ...


class MappedFile:
    """A file mapped read-only. Views keep the mapping alive; it is unmapped when the last of them is gone."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError where the file is absent, unreadable or empty."""
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size == 0:
                    raise ModelFileError("the file is empty; download it again", path=path)
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFileError(f"cannot open the file: {error.strerror or error}", path=path) from error

    def view(self, info: TensorInfo, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        """A read-only array over the bytes of `info`; their number must be what dtype and shape ask for."""
        count = info.nbytes // dtype.itemsize
        if count == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self.buffer, dtype, count, info.offset).reshape(shape)

    def drop(self, info: TensorInfo) -> None:
        """Let the system take back the pages that hold this tensor only; a later read brings them in again."""
        page = mmap.PAGESIZE
        start = -(-info.offset // page) * page
        stop = (info.offset + info.nbytes) // page * page
        if stop > start and hasattr(self.buffer, "madvise"):
            self.buffer.madvise(mmap.MADV_DONTNEED, start, stop - start)


def check_layout(infos: Iterable[TensorInfo], file_size: int, path: Path) -> None:
    """Raise ModelFileError unless every tensor lies inside the file and no two overlap."""
    end, previous = 0, ""
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset + info.nbytes > file_size:
            raise ModelFileError(
                f"tensor data ends at byte {info.offset + info.nbytes} but the file has {file_size}; "
                "the download is incomplete, fetch the file again",
                path=path,
                tensor=info.name,
            )
        if info.nbytes and info.offset < end:
            raise ModelFileError(
                f"tensor data overlaps that of `{previous}`; the file is corrupt, fetch it again",
                path=path,
                tensor=info.name,
            )
        if info.nbytes:
            end, previous = info.offset + info.nbytes, info.name
