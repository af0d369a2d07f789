"""A weight on its way from a file into a layer, with the storage it has there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pagoda.kernels.gguf_blocks import dequantize

__all__ = ["SourceTensor"]


@dataclass(frozen=True)
class SourceTensor:
    """Rows of a weight as the file holds them: no copy is made before it is packed.

    `array` is (N, K) or (N,) of float32, bfloat16 or float16; or, with a block-quantized `ggml_type`, uint8
    (N, bytes per row). `shape` is always in weights.
    """

    name: str
    array: np.ndarray
    shape: tuple[int, ...]
    ggml_type: str | None = None  # "Q4_1", ... for block-quantized rows

    def rows(self, index: slice | np.ndarray) -> SourceTensor:
        """Some rows (outputs), whatever the format: quantized blocks never span rows."""
        part = self.array[index]
        return replace(self, array=part, shape=(part.shape[0], *self.shape[1:]))

    def as_float32(self) -> np.ndarray:
        """Dense copy, for vectors and for formats that have no kernel of their own."""
        if self.ggml_type is None:
            return np.asarray(self.array, dtype=np.float32)
        return dequantize(self.ggml_type, self.array).reshape(self.shape)
