"""Small parameters that every kind of layer has."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.loader.slot import check_shape
from pagoda.loader.tensor import SourceTensor

__all__ = ["Vector"]


class Vector:
    """A norm weight or a bias: float32, small, never quantized. `plus_one` for checkpoints that store w - 1."""

    def __init__(self, size: int, *, plus_one: bool = False) -> None:
        self.shape: tuple[int, ...] = (size,)
        self.is_loaded = False
        self.is_optional = False
        self._plus_one = plus_one
        self.array: Any = np.empty(size, np.float32)

    @property
    def is_packed(self) -> bool:
        return self.is_loaded

    def load(self, source: SourceTensor) -> None:
        check_shape(source, self.shape)
        self.array[:] = source.as_float32()
        if self._plus_one:
            self.array += 1.0
        self.is_loaded = True
