"""Packed weights: a matrix (N outputs, K inputs) laid out the way the kernels read it.

Outputs are cut into panels of 16 (the lanes of a vector); N is padded to whole panels. All formats are one run of
bytes, panel after panel:

    f32    [N/16][K][16]            float32
    bf16   [N/16][K/2][16][2]       bfloat16, K padded to even: pairs of k for the dot instruction
    q8_0   [N/16][K/32]{ d 16 x f16,             16 outputs x 32 bytes  as [8][16][4], value + 128 }
    q4_0   [N/16][K/32]{ d 16 x f16,             16 outputs x 32 nibbles as [4][16][4] bytes        }
    q4_1   [N/16][K/32]{ d 16 x f16, m 16 x f16, 16 outputs x 32 nibbles as [4][16][4] bytes        }

Byte [j][n][t] of an 8-bit block is k = 4j + t; of a 4-bit block its low nibble is k = 4j + t and its high nibble
k = 16 + 4j + t. Values are d * (q - 128), d * (q - 8) and d * q + m.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import ml_dtypes
import numpy as np

from pagoda.kernels import gguf_blocks
from pagoda.kernels.memory import allocate

__all__ = ["FORMATS", "GgmlRows", "Weight", "pack", "packed_nbytes", "unpack"]

PANEL = 16
FORMATS = ("f32", "bf16", "q8_0", "q4_0", "q4_1")
_BLOCK_BYTES = {"q8_0": 32 + 512, "q4_0": 32 + 256, "q4_1": 64 + 256}


class GgmlRows(NamedTuple):
    """Rows as a GGUF file stores them: the type's name and uint8 (N, bytes per row)."""

    type_name: str
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Weight:
    """A packed matrix. `data` is uint8, 64-byte aligned, laid out as drawn above and never changed."""

    format: str
    shape: tuple[int, int]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    @cached_property
    def dense(self) -> np.ndarray:
        """The float32 matrix, kept once computed: what the references multiply with."""
        return unpack(self)


def packed_nbytes(format: str, num_rows: int, num_cols: int) -> int:
    """Bytes `pack` allocates for this format and shape."""
    panels = -(-num_rows // PANEL)
    if format == "f32":
        return panels * num_cols * PANEL * 4
    if format == "bf16":
        return panels * (num_cols + num_cols % 2) * PANEL * 2
    return panels * (num_cols // 32) * _BLOCK_BYTES[format]


def pack(format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Weight:
    """Packs matrices with the same K, stacked along N (so that q, k and v become one product).

    A part is float32, float16 or bfloat16 (n, K), or GGUF rows. GGUF rows of the target's own type are taken as they
    are; anything else goes through float32. Each part is read once. ValueError for an unknown format, differing K,
    or K not a multiple of 32 in a block format.
    """
    if format not in FORMATS:
        raise ValueError(f"weight format `{format}` is not one of {', '.join(FORMATS)}")
    sizes = [_shape_of(part) for part in parts]
    widths = {k for _, k in sizes}
    if len(widths) != 1:
        raise ValueError(f"parts to stack have different widths {sorted(widths)}")
    num_rows, num_cols = sum(n for n, _ in sizes), widths.pop()
    if format in _BLOCK_BYTES and num_cols % 32:
        raise ValueError(f"format `{format}` needs a width that is a multiple of 32, got {num_cols}")
    data = allocate(packed_nbytes(format, num_rows, num_cols))
    panels = data.reshape(-(-num_rows // PANEL), -1)
    for first, rows in _whole_panels(format, parts):
        panels[first : first + len(rows) // PANEL] = _PACKERS[format](rows).reshape(len(rows) // PANEL, -1)
    data.flags.writeable = False
    return Weight(format, (num_rows, num_cols), data)


def unpack(weight: Weight) -> np.ndarray:
    """The matrix a packed weight stands for -> float32 (N, K)."""
    num_rows, num_cols = weight.shape
    panels = weight.data.reshape(-(-num_rows // PANEL), -1)
    if weight.format == "f32":
        dense = panels.view(np.float32).reshape(-1, num_cols, PANEL).transpose(0, 2, 1)
    elif weight.format == "bf16":
        pairs = panels.view(ml_dtypes.bfloat16).reshape(len(panels), -1, PANEL, 2).astype(np.float32)
        dense = pairs.transpose(0, 2, 1, 3)
    else:
        dense = _unpack_blocks(weight.format, panels, num_cols)
    dense = dense.reshape(len(panels) * PANEL, -1)[:num_rows, :num_cols]
    return np.ascontiguousarray(dense, np.float32)


def _unpack_blocks(format: str, panels: np.ndarray, num_cols: int) -> np.ndarray:
    blocks = panels.reshape(len(panels), num_cols // 32, -1)
    scales = np.ascontiguousarray(blocks[..., :32]).view(np.float16).astype(np.float32)
    if format == "q8_0":
        q = blocks[..., 32:].reshape(*blocks.shape[:2], 8, PANEL, 4).astype(np.float32) - 128
    else:
        packed = blocks[..., -256:].reshape(*blocks.shape[:2], 4, PANEL, 4)
        q = np.concatenate([packed & 15, packed >> 4], axis=2).astype(np.float32) - (8 if format == "q4_0" else 0)
    values = q * scales[:, :, None, :, None]
    if format == "q4_1":
        minima = np.ascontiguousarray(blocks[..., 32:64]).view(np.float16).astype(np.float32)
        values += minima[:, :, None, :, None]
    return values.transpose(0, 3, 1, 2, 4)


def _shape_of(part: np.ndarray | GgmlRows) -> tuple[int, int]:
    if isinstance(part, GgmlRows):
        values, num_bytes = gguf_blocks.BLOCK_SIZES[part.type_name]
        return part.rows.shape[0], part.rows.shape[1] // num_bytes * values
    return part.shape[0], part.shape[1]


def _native_rows(format: str, part: np.ndarray | GgmlRows) -> np.ndarray:
    """The part in the form its packer reads: floats of the target type, or raw rows of the target block type."""
    if format in _BLOCK_BYTES:
        type_name = format.upper()
        if isinstance(part, GgmlRows):
            if part.type_name == type_name:
                return part.rows
            part = gguf_blocks.dequantize(part.type_name, part.rows)
        return gguf_blocks.quantize(type_name, np.asarray(part, np.float32))
    if isinstance(part, GgmlRows):
        part = gguf_blocks.dequantize(part.type_name, part.rows)
    return np.asarray(part, np.float32 if format == "f32" else ml_dtypes.bfloat16)


_CHUNK_ROWS = 1024  # converted at a time, so that the float32 copy of a big tensor never exists


def _chunks(format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Iterator[np.ndarray]:
    for part in parts:
        for start in range(0, _shape_of(part)[0], _CHUNK_ROWS):
            stop = start + _CHUNK_ROWS
            piece = GgmlRows(part.type_name, part.rows[start:stop]) if isinstance(part, GgmlRows) else part[start:stop]
            yield _native_rows(format, piece)


def _whole_panels(format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Iterator[tuple[int, np.ndarray]]:
    """(first panel, rows) with the rows a multiple of 16, parts run together, the last one padded with zeros."""
    panel, held = 0, None
    for rows in _chunks(format, parts):
        if held is not None and len(held):
            rows = np.concatenate([held, rows])
        whole = len(rows) - len(rows) % PANEL
        if whole:
            yield panel, rows[:whole]
            panel += whole // PANEL
        held = rows[whole:]
    if held is not None and len(held):
        padding = np.zeros((PANEL - len(held), held.shape[1]), held.dtype)
        yield panel, np.concatenate([held, padding])


def _pack_f32(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, PANEL, rows.shape[1]).transpose(0, 2, 1)).view(np.uint8)


def _pack_bf16(rows: np.ndarray) -> np.ndarray:
    if rows.shape[1] % 2:
        rows = np.concatenate([rows, np.zeros((len(rows), 1), rows.dtype)], axis=1)
    pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, PANEL, rows.shape[1] // 2)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1)).view(np.uint8)


def _pack_q4_1(rows: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(rows).view(np.uint32).reshape(len(rows) // PANEL, PANEL, -1, 5)  # d|m, 4 x nibbles
    out = np.empty((words.shape[0], words.shape[2], 80), np.uint32)
    heads = np.ascontiguousarray(words[..., 0].transpose(0, 2, 1)).view(np.uint16)
    out[..., :8] = np.ascontiguousarray(heads[..., 0::2]).view(np.uint32)
    out[..., 8:16] = np.ascontiguousarray(heads[..., 1::2]).view(np.uint32)
    out[..., 16:].reshape(*out.shape[:2], 4, PANEL)[...] = words[..., 1:].transpose(0, 2, 3, 1)
    return out.view(np.uint8)


def _pack_f16_scaled(rows: np.ndarray, num_words: int, flip: int) -> np.ndarray:
    """Blocks of one f16 scale and `num_words` 32-bit words of integers, each xored with `flip`."""
    halves = np.ascontiguousarray(rows).view(np.uint16).reshape(len(rows) // PANEL, PANEL, -1, 1 + 2 * num_words)
    words = np.ascontiguousarray(halves[..., 1:]).view(np.uint32)
    out = np.empty((halves.shape[0], halves.shape[2], 8 + num_words * PANEL), np.uint32)
    out[..., :8] = np.ascontiguousarray(halves[..., 0].transpose(0, 2, 1)).view(np.uint32)
    if flip:
        words ^= np.uint32(flip)
    panels = words.reshape(*halves.shape[:3], num_words).transpose(0, 2, 3, 1)
    out[..., 8:].reshape(*out.shape[:2], num_words, PANEL)[...] = panels
    return out.view(np.uint8)


def _pack_q4_0(rows: np.ndarray) -> np.ndarray:
    return _pack_f16_scaled(rows, 4, 0)


def _pack_q8_0(rows: np.ndarray) -> np.ndarray:
    return _pack_f16_scaled(rows, 8, 0x80808080)


_PACKERS = {"f32": _pack_f32, "bf16": _pack_bf16, "q4_1": _pack_q4_1, "q4_0": _pack_q4_0, "q8_0": _pack_q8_0}
