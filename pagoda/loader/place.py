"""The loader's last step: where a weight ends up once it has been read. On a CPU in our native layout, on a GPU as a tensor.

Layers are given a place through their `Precision`, and never learn which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pagoda.kernels.weight import GgmlRows, pack

__all__ = ["HOST", "HostPlace", "Place"]


class Place(Protocol):
    """`worker/device.py` has the one of a GPU."""

    def weight(self, format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Any:
        """Matrices of one width, stacked along N, packed for the kernels. ValueError as `kernels.weight.pack`."""

    def vector(self, array: np.ndarray, *, is_addend: bool = False) -> Any:
        """A small float32 array that kernels read; `is_addend`: a bias, which products want in the type of activations."""


class HostPlace:
    def weight(self, format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Any:
        return pack(format, parts)

    def vector(self, array: np.ndarray, *, is_addend: bool = False) -> Any:
        return array


HOST = HostPlace()
