"""The seam between a checkpoint's storage of a linear weight and the kernels' packed formats.

A scheme answers three questions: in which format do these rows stay in memory, how are they packed, and which op
multiplies by them. Formats the kernels keep packed stay as they are; others are dequantized while loading, and that is
reported, never hidden. With `Precision.quantization` float rows, and blocks wider than asked for, become blocks while
loading, a thousand rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pagoda.base.registry import Registry
from pagoda.kernels import ops
from pagoda.kernels.gguf_blocks import BLOCK_SIZES
from pagoda.kernels.weight import GgmlRows, Weight, width_unit
from pagoda.loader.place import HOST, Place
from pagoda.loader.tensor import SourceTensor

__all__ = ["SCHEMES", "Precision", "Scheme", "not_kept", "scheme_for"]

_PLAIN_TYPES = ("F32", "F16", "BF16", "F64")
KEPT_BLOCK_FORMATS = {name.upper(): name for name in ("q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k")}
DENSE_FORMATS = {"float32": "f32", "float16": "f32", "bfloat16": "bf16"}  # float16 exists on a GPU only, whose place narrows it
@dataclass(frozen=True)
class Precision:
    """What the user asked of a model's weights and products."""

    dtype: str
    """Of weights that stay floats: "float32" or "bfloat16"; on a GPU "float16" too."""

    quantization: Literal["int8", "int4"] | None = None
    """Weights of 8 or of 4 bits made while loading; None: as the checkpoint has them. Blocks of 32, but int8 to be multiplied with
    8-bit activations has one scale an output (format i8)."""

    activations: Literal["int8", "int16"] = "int16"
    """What block formats multiply with."""

    place: Place = HOST
    """Where weights go once they are read."""


def _blocks_for(precision: Precision, is_table: bool) -> tuple[tuple[str, ...], str]:
    """Stored formats that quantizing leaves alone, and the one it makes of the others. `int4` keeps the vocabulary's table in eight bits."""
    if precision.quantization == "int8":
        return ((), "i8") if precision.activations == "int8" else (("q8_0",), "q8_0")
    return (tuple(KEPT_BLOCK_FORMATS.values()), "q8_0") if is_table else (("q4_0", "q4_1", "q4_k"), "q4_1")


class Scheme(Protocol):
    """How one kind of checkpoint weight becomes a packed one."""

    name: str

    def format_of(self, part: SourceTensor, precision: Precision, *, is_table: bool = False) -> str:
        """The packed format of these rows. A table is the vocabulary's: read by rows, and the language head."""

    def pack(self, parts: list[SourceTensor], precision: Precision, *, is_table: bool = False) -> Weight:
        """Rows of `parts`, one under the other, packed. All parts have the same format and width."""

    def apply(self, x_TK: Any, weight: Weight, bias_N: Any, *, residual: Any, out: Any) -> Any:
        """y = x W^T + bias + residual."""


class _Dense:
    """float32, bfloat16 and float16 checkpoints: stored as `dtype`, or quantized."""

    name = "dense"

    def format_of(self, part: SourceTensor, precision: Precision, *, is_table: bool = False) -> str:
        stored = KEPT_BLOCK_FORMATS.get(part.ggml_type or "")
        if precision.quantization:
            small, target = _blocks_for(precision, is_table)
            if stored not in small and part.shape[-1] % width_unit(target) == 0:
                stored = target
        if stored is None:
            return DENSE_FORMATS[precision.dtype]
        return f"{stored}_a8" if precision.activations == "int8" and stored != "i8" else stored

    def pack(self, parts: list[SourceTensor], precision: Precision, *, is_table: bool = False) -> Weight:
        return precision.place.weight(self.format_of(parts[0], precision, is_table=is_table), [part.array for part in parts])

    def apply(self, x_TK: Any, weight: Weight, bias_N: Any, *, residual: Any, out: Any) -> Any:
        return ops.linear(x_TK, weight, bias_N, residual=residual, out=out)


class _GgufBlocks(_Dense):
    """GGUF block formats: kept as they are where there is a kernel, else dequantized, and quantized again if asked."""

    name = "gguf"

    def pack(self, parts: list[SourceTensor], precision: Precision, *, is_table: bool = False) -> Weight:
        rows = [GgmlRows(part.ggml_type, part.array) for part in parts if part.ggml_type]
        return precision.place.weight(self.format_of(parts[0], precision, is_table=is_table), rows)


SCHEMES: Registry[Scheme] = Registry("quantization")
SCHEMES.add("dense", _Dense())
SCHEMES.add("gguf", _GgufBlocks())


def scheme_for(part: SourceTensor) -> Scheme:
    """The scheme of a tensor, by how its file stores it."""
    return SCHEMES.get("gguf" if part.ggml_type else "dense")


def not_kept(ggml_types: Iterable[str]) -> list[str]:
    """Block types among these that no kernel multiplies packed: their weights are dequantized while loading."""
    return sorted({name for name in ggml_types if name in BLOCK_SIZES and name not in (*KEPT_BLOCK_FORMATS, *_PLAIN_TYPES)})
