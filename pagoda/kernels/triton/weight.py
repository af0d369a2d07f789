"""Matrices as a GPU keeps them: what `kernels/weight.py` is for a CPU. y = x W^T, W is (N, K).

    16 bits   data (N, K) of the activations' type
     8 bits   data int8  (N, P)          value k of a row at byte k
     4 bits   data uint8 (N, P / 2)      chunks of 128 values in 64 bytes: byte c has value c in its low half, 64 + c above
              scales, minima (P / G, N)  one per G values of a row, G = 32 or 16, outputs side by side

K is padded to P, a multiple of 128, with values that a kernel multiplies by zero. A value is scale * (q - offset) + minimum.
The halves of a chunk lie 64 apart so that each is one contiguous run of activations, and a tile of bytes gives two
products without shuffling. Formats map to this as

    q8_0 8 bits   q4_0 4, offset 8   q4_1 4, minima    scales float16, as stored
    q4_k 4, minima   q5_k 8, minima   q6_k 8, G = 16   scales float32: products of the format's two levels, exact

Formats whose activations are rounded on a CPU (`_a8`) are the same here: activations stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

from pagoda.kernels import gguf_blocks
from pagoda.kernels.weight import FORMATS, GgmlRows, native_chunks, shape_of, storage_of, width_unit

__all__ = ["CHUNK", "DeviceWeight", "pack_for_device"]

CHUNK = 128


@dataclass(frozen=True, eq=False)
class DeviceWeight:
    """A matrix on a GPU, laid out as drawn above. `dtype` is the torch type of activations and results."""

    format: str
    shape: tuple[int, int]
    dtype: Any
    bits: int
    data: Any
    scales: Any = None
    minima: Any = None
    group: int = 32
    offset: int = 0
    fixed_tiles: bool = False  # --batch-invariant: one tile for any number of rows

    @property
    def nbytes(self) -> int:
        return sum(int(x.nbytes) for x in (self.data, self.scales, self.minima) if x is not None)


class _Split(NamedTuple):
    """Rows of a block format taken apart: integers (n, K), scales and minima (n, K / group)."""

    values: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None


def pack_for_device(
    format: str, parts: Sequence[np.ndarray | GgmlRows], *, device: Any, dtype: Any, fixed_tiles: bool = False
) -> DeviceWeight:
    """Matrices with the same K, stacked along N, on `device`; a part is what `kernels.weight.pack` takes. ValueError as there."""
    if format not in FORMATS:
        raise ValueError(f"weight format `{format}` is not one of {', '.join(FORMATS)}")
    widths = {shape_of(part)[1] for part in parts}
    if len(widths) != 1:
        raise ValueError(f"parts to stack have different widths {sorted(widths)}")
    num_rows, num_cols = sum(shape_of(part)[0] for part in parts), widths.pop()
    if num_cols % width_unit(format):
        raise ValueError(f"format `{format}` needs a width that is a multiple of {width_unit(format)}, got {num_cols}")
    storage = storage_of(format)
    if storage in ("f32", "bf16"):
        data = torch.empty((num_rows, num_cols), dtype=dtype, device=device)
        row = 0
        for piece in native_chunks("f32", parts) if dtype != torch.bfloat16 else native_chunks("bf16", parts):
            data[row : row + len(piece)].copy_(_tensor(piece))
            row += len(piece)
        return DeviceWeight(format, (num_rows, num_cols), dtype, 16, data, fixed_tiles=fixed_tiles)
    return _pack_blocks(format, parts, (num_rows, num_cols), device, dtype, fixed_tiles)


def _pack_blocks(
    format: str, parts: Sequence[np.ndarray | GgmlRows], shape: tuple[int, int], device: Any, dtype: Any, fixed_tiles: bool
) -> DeviceWeight:
    storage = storage_of(format)
    bits, group, offset = _LAYOUTS[storage]
    (num_rows, num_cols), padded = shape, -(-shape[1] // CHUNK) * CHUNK
    scale_type = torch.float32 if storage.endswith("_k") else torch.float16
    byte_type, bytes_per_row = (torch.uint8, padded // 2) if bits == 4 else (torch.int8, padded)
    data = torch.empty((num_rows, bytes_per_row), dtype=byte_type, device=device)
    scales = torch.zeros((padded // group, num_rows), dtype=scale_type, device=device)
    minima = torch.zeros_like(scales) if storage in ("q4_1", "q4_k", "q5_k") else None
    row, groups = 0, num_cols // group
    for raw in native_chunks(storage, parts):
        found, rows = _SPLITTERS[storage](raw), slice(row, row + len(raw))
        values = np.zeros((len(raw), padded), found.values.dtype)
        values[:, :num_cols] = found.values
        if bits == 4:
            halves = values.reshape(len(raw), -1, 2, CHUNK // 2)
            values = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(len(raw), -1)
        data[rows].copy_(_tensor(values))
        scales[:groups, rows].copy_(_tensor(np.ascontiguousarray(found.scales.T)))
        if minima is not None and found.minima is not None:
            minima[:groups, rows].copy_(_tensor(np.ascontiguousarray(found.minima.T)))
        row += len(raw)
    return DeviceWeight(format, shape, dtype, bits, data, scales, minima, group, offset, fixed_tiles)


def _tensor(array: np.ndarray) -> Any:
    """A torch view of a numpy array, bfloat16 included."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """(n, blocks, 16) bytes -> (n, blocks * 32) values."""
    return np.concatenate([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _blocks(rows: np.ndarray, storage: str) -> np.ndarray:
    return np.ascontiguousarray(rows).reshape(len(rows), -1, gguf_blocks.BLOCK_SIZES[storage.upper()][1])


def _split_q8_0(rows: np.ndarray) -> _Split:
    blocks = _blocks(rows, "q8_0")
    return _Split(np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(len(rows), -1), _halves(blocks, 0), None)


def _split_q4_0(rows: np.ndarray) -> _Split:
    blocks = _blocks(rows, "q4_0")
    return _Split(_nibbles(blocks[..., 2:]), _halves(blocks, 0), None)


def _split_q4_1(rows: np.ndarray) -> _Split:
    blocks = _blocks(rows, "q4_1")
    return _Split(_nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _split_four_bit_k(rows: np.ndarray, type_name: str) -> _Split:
    flat = _blocks(rows, type_name).reshape(-1, gguf_blocks.BLOCK_SIZES[type_name][1])
    scales, minima = (s.reshape(-1, 8).astype(np.float32) for s in gguf_blocks.six_bit_scales(flat[:, 4:16]))
    d, dmin = (_halves(flat, at).astype(np.float32)[:, None] for at in (0, 2))
    values = gguf_blocks.K_INTEGERS[type_name](flat).reshape(len(rows), -1)
    values = values.astype(np.uint8 if type_name == "Q4_K" else np.int8)
    return _Split(values, (d * scales).reshape(len(rows), -1), (-dmin * minima).reshape(len(rows), -1))


def _split_q4_k(rows: np.ndarray) -> _Split:
    return _split_four_bit_k(rows, "Q4_K")


def _split_q5_k(rows: np.ndarray) -> _Split:
    return _split_four_bit_k(rows, "Q5_K")


def _split_q6_k(rows: np.ndarray) -> _Split:
    flat = _blocks(rows, "q6_k").reshape(-1, gguf_blocks.BLOCK_SIZES["Q6_K"][1])
    values = gguf_blocks.K_INTEGERS["Q6_K"](flat).reshape(len(rows), -1).astype(np.int16) - 32
    scales = _halves(flat, 208).astype(np.float32)[:, None] * flat[:, 192:208].view(np.int8).astype(np.float32)
    return _Split(values.astype(np.int8), scales.reshape(len(rows), -1), None)


_LAYOUTS = {  # bits, group, offset
    "q8_0": (8, 32, 0),
    "q4_0": (4, 32, 8),
    "q4_1": (4, 32, 0),
    "q4_k": (4, 32, 0),
    "q5_k": (8, 32, 0),
    "q6_k": (8, 16, 0),
}
_SPLITTERS = {
    "q8_0": _split_q8_0,
    "q4_0": _split_q4_0,
    "q4_1": _split_q4_1,
    "q4_k": _split_q4_k,
    "q5_k": _split_q5_k,
    "q6_k": _split_q6_k,
}
