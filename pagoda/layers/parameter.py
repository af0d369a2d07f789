"""The places weights go: named slots that a loader fills and that say what is missing."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pagoda.base.errors import ModelFileError
from pagoda.loader.tensor import SourceTensor

__all__ = ["Slot", "Vector"]


class Slot(Protocol):
    """One tensor of a checkpoint. `load` may keep a view of the source until its layer is complete."""

    def load(self, source: SourceTensor) -> None: ...

    @property
    def is_loaded(self) -> bool: ...

    @property
    def is_packed(self) -> bool:
        """No view of the source is held any more: its pages may go."""

    @property
    def is_optional(self) -> bool: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Vector:
    """A norm weight or a bias: float32, small, never quantized. `plus_one` for checkpoints that store w - 1."""

    def __init__(self, size: int, *, plus_one: bool = False) -> None:
        self.shape: tuple[int, ...] = (size,)
        self.is_loaded = False
        self.is_optional = False
        self._plus_one = plus_one
        self.array = np.empty(size, np.float32)

    @property
    def is_packed(self) -> bool:
        return self.is_loaded

    def load(self, source: SourceTensor) -> None:
        check_shape(source, self.shape)
        self.array[:] = source.as_float32()
        if self._plus_one:
            self.array += 1.0
        self.is_loaded = True


def check_shape(source: SourceTensor, expected: tuple[int, ...]) -> None:
    """ModelFileError when a file's tensor is not of the shape the model's config asks for."""
    if tuple(source.shape) != expected:
        raise ModelFileError(
            f"has shape {tuple(source.shape)}, but the model's config asks for {expected}; the file and its config do not belong together",
            tensor=source.name,
        )
