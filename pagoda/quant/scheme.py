"""The seam between a checkpoint's storage of a linear weight and the kernels' packed formats.

A scheme answers three questions: in which format do these rows stay in memory, how are they packed, and which op
multiplies by them. Formats the kernels keep packed stay as they are; others are dequantized while loading, and that is
reported, never hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

from pagoda.base.registry import Registry
from pagoda.kernels import ops
from pagoda.kernels.weight import GgmlRows, Weight, pack
from pagoda.loader.tensor import SourceTensor

__all__ = ["SCHEMES", "Scheme", "scheme_for"]

KEPT_BLOCK_FORMATS = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q8_0": "q8_0"}
DENSE_FORMATS = {"float32": "f32", "bfloat16": "bf16"}


class Scheme(Protocol):
    """How one kind of checkpoint weight becomes a packed one."""

    name: str

    def format_of(self, part: SourceTensor, dtype: str) -> str:
        """The packed format of these rows when unquantized weights are to be `dtype`."""

    def pack(self, parts: list[SourceTensor], dtype: str) -> Weight:
        """Rows of `parts`, one under the other, packed. All parts have the same format and width."""

    def apply(self, x_TK: Any, weight: Weight, bias_N: Any, *, residual: Any, out: Any) -> Any:
        """y = x W^T + bias + residual."""


class _Dense:
    """float32, bfloat16 and float16 checkpoints: stored as `dtype`."""

    name = "dense"

    def format_of(self, part: SourceTensor, dtype: str) -> str:
        return DENSE_FORMATS[dtype]

    def pack(self, parts: list[SourceTensor], dtype: str) -> Weight:
        return pack(self.format_of(parts[0], dtype), [part.array for part in parts])

    def apply(self, x_TK: Any, weight: Weight, bias_N: Any, *, residual: Any, out: Any) -> Any:
        return ops.linear(x_TK, weight, bias_N, residual=residual, out=out)


class _GgufBlocks(_Dense):
    """GGUF block formats: kept as they are where there is a kernel, else dequantized to `dtype`."""

    name = "gguf"

    def format_of(self, part: SourceTensor, dtype: str) -> str:
        return KEPT_BLOCK_FORMATS.get(part.ggml_type or "", DENSE_FORMATS[dtype])

    def pack(self, parts: list[SourceTensor], dtype: str) -> Weight:
        rows = [GgmlRows(part.ggml_type, part.array) for part in parts if part.ggml_type]
        return pack(self.format_of(parts[0], dtype), rows)


SCHEMES: Registry[Scheme] = Registry("quantization")
SCHEMES.add("dense", _Dense())
SCHEMES.add("gguf", _GgufBlocks())


def scheme_for(part: SourceTensor) -> Scheme:
    """The scheme of a tensor, by how its file stores it."""
    return SCHEMES.get("gguf" if part.ggml_type else "dense")
