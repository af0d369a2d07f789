"""Packed weights: a matrix (N outputs, K inputs) laid out the way the kernels read it.

Outputs are cut into panels of 16 (the lanes of a vector); N is padded to whole panels. All formats are one run of
bytes, panel after panel:

    f32    [N/16][K][16]            float32
    bf16   [N/16][K/2][16][2]       bfloat16, K padded to even: pairs of k for the dot instruction
    q8_0   [N/16][K/32]{ d 16 x f16,             32 bytes a output as [8][16][4], value + 128 }
    q4_0   [N/16][K/32]{ d 16 x f16,             nibbles }
    q4_1   [N/16][K/32]{ d 16 x f16, m 16 x f16, nibbles }
    q4_k   [N/16][K/256]{ d 16 x f16, dmin 16 x f16, scales [8][16] u8, minima [8][16] u8, 8 x nibbles }
    q5_k   [N/16][K/256]{ as q4_k,  8 x fifth bits [16][4] bytes: bit j of byte [n][t] is of k = 4j + t }
    q6_k   [N/16][K/256]{ d 16 x f16, scales [8][2][16] i8, 8 x { nibbles, high bits [2][16][4] bytes } }
    i8     [N/16]{ d 16 x f32, [K/4][16][4] bytes, value + 128 }, then the turn's waves in float32

Byte [j][n][t] of an 8-bit block is k = 4j + t of output n. A block's nibbles are [4][16][4] bytes, whose low halves are
k = 4j + t and whose high halves are k = 16 + 4j + t. Bits 2s, 2s + 1 of byte [i][n][t] of q6_k's high bits are of
k = 16i + 4s + t.

    q8_0  d * (q - 128)      q4_0  d * (q - 8)      q4_1  d * q + m
    q4_k, q5_k  d * scale * q - dmin * minimum, per 32 values      q6_k  d * scale * (q - 32), per 16 values

    i8    d * (q - 128), one d for a whole output, of rows that were turned (kernels/rotation.py; d holds the 1 / K)

A block format with `_a8` at its end is stored alike; its product rounds activations to 8 bits in blocks of 32 (to 16
bits without), which is twice as fast on many rows and costs some quality. Format i8 turns activations as its weights were turned and
rounds them to 8 bits, one scale a row: all of K is one exact integer product. The waves are `rotation.waves(K)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pagoda.kernels import gguf_blocks, rotation
from pagoda.kernels.memory import allocate

__all__ = ["BLOCK_FORMATS", "FORMATS", "GgmlRows", "Weight", "native_chunks", "pack", "packed_nbytes", "shape_of", "storage_of", "unpack", "width_unit"]

PANEL = 16
_UNITS = {  # values of K stored together, and bytes of 16 outputs' of them
    "q8_0": (32, 32 + 512),
    "q4_0": (32, 32 + 256),
    "q4_1": (32, 64 + 256),
    "q4_k": (256, 64 + 256 + 8 * 256),
    "q5_k": (256, 64 + 256 + 8 * 320),
    "q6_k": (256, 32 + 256 + 8 * 384),
}
BLOCK_FORMATS = tuple(_UNITS)
FORMATS = ("f32", "bf16", "i8", *BLOCK_FORMATS, *(f"{name}_a8" for name in BLOCK_FORMATS))


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


def storage_of(format: str) -> str:
    """How a format's weights are stored: its name without the precision of activations."""
    return format.removesuffix("_a8")


def width_unit(format: str) -> int:
    """K must be a multiple of this."""
    return 16 if format == "i8" else _UNITS.get(storage_of(format), (1, 0))[0]


def packed_nbytes(format: str, num_rows: int, num_cols: int) -> int:
    """Bytes `pack` allocates for this format and shape."""
    panels = -(-num_rows // PANEL)
    if format == "f32":
        return panels * num_cols * PANEL * 4
    if format == "bf16":
        return panels * (num_cols + num_cols % 2) * PANEL * 2
    if format == "i8":
        return panels * (64 + num_cols * PANEL) + rotation.waves(num_cols).nbytes
    values, nbytes = _UNITS[storage_of(format)]
    return panels * (num_cols // values) * nbytes


def pack(format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Weight:
    """Packs matrices with the same K, stacked along N (so that q, k and v become one product).

    A part is float32, float16 or bfloat16 (n, K), or GGUF rows. GGUF rows of the target's own type are taken as they
    are; anything else goes through float32, a thousand rows at a time. ValueError for an unknown format, differing K,
    K not a multiple of the format's unit, or floats for a format that has no quantizer (q4_k, q5_k, q6_k).
    """
    if format not in FORMATS:
        raise ValueError(f"weight format `{format}` is not one of {', '.join(FORMATS)}")
    sizes = [shape_of(part) for part in parts]
    widths = {k for _, k in sizes}
    if len(widths) != 1:
        raise ValueError(f"parts to stack have different widths {sorted(widths)}")
    num_rows, num_cols = sum(n for n, _ in sizes), widths.pop()
    if num_cols % width_unit(format):
        raise ValueError(f"format `{format}` needs a width that is a multiple of {width_unit(format)}, got {num_cols}")
    data = allocate(packed_nbytes(format, num_rows, num_cols))
    tail = 0
    if format == "i8":
        waves = rotation.waves(num_cols).view(np.uint8).reshape(-1)
        tail = len(waves)
        data[len(data) - tail :] = waves
    panels = data[: len(data) - tail].reshape(-(-num_rows // PANEL), -1)
    storage = storage_of(format)
    for first, rows in _whole_panels(storage, parts):
        panels[first : first + len(rows) // PANEL] = _PACKERS[storage](rows).reshape(len(rows) // PANEL, -1)
    data.flags.writeable = False
    return Weight(format, (num_rows, num_cols), data)


def unpack(weight: Weight) -> np.ndarray:
    """The matrix a packed weight stands for -> float32 (N, K)."""
    num_rows, num_cols = weight.shape
    if weight.format == "i8":
        return _unpack_i8(weight)
    panels = weight.data.reshape(-(-num_rows // PANEL), -1)
    if weight.format == "f32":
        dense = panels.view(np.float32).reshape(-1, num_cols, PANEL).transpose(0, 2, 1)
    elif weight.format == "bf16":
        pairs = panels.view(ml_dtypes.bfloat16).reshape(len(panels), -1, PANEL, 2).astype(np.float32)
        dense = pairs.transpose(0, 2, 1, 3)
    else:
        values, nbytes = _UNITS[storage_of(weight.format)]
        dense = _unpack_units(storage_of(weight.format), panels.reshape(len(panels), num_cols // values, nbytes))
    dense = dense.reshape(len(panels) * PANEL, -1)[:num_rows, :num_cols]
    return np.ascontiguousarray(dense, np.float32)


def _nibble_bytes(packed: np.ndarray) -> np.ndarray:
    """(..., 4, 16, 4) bytes -> (..., 8, 16, 4) values of 4 bits."""
    return np.concatenate([packed & 15, packed >> 4], axis=-3)


def _halves(units: np.ndarray, at: int) -> np.ndarray:
    """16 half floats at byte `at` of each unit -> float32 (..., 1, 1, 16, 1)."""
    found = np.ascontiguousarray(units[..., at : at + 32]).view(np.float16).astype(np.float32)
    return found[..., None, None, :, None]


def _unpack_units(storage: str, units: np.ndarray) -> np.ndarray:
    """Units (panels, count, bytes) -> float32 (panels, 16, count, values / 4, 4)."""
    shape = units.shape[:2]
    values: Any
    q: Any
    if storage in ("q8_0", "q4_0", "q4_1"):
        if storage == "q8_0":
            q = units[..., 32:].reshape(*shape, 1, 8, PANEL, 4).astype(np.float32) - 128
        else:
            q = _nibble_bytes(units[..., -256:].reshape(*shape, 1, 4, PANEL, 4)).astype(np.float32)
        values = (q - 8 if storage == "q4_0" else q) * _halves(units, 0)
        values = values + _halves(units, 32) if storage == "q4_1" else values
    elif storage == "q6_k":
        blocks = units[..., 288:].reshape(*shape, 8, 384)
        high = blocks[..., 256:].reshape(*shape, 8, 2, 1, PANEL, 4) >> np.array([0, 2, 4, 6], np.uint8)[:, None, None]
        low = _nibble_bytes(blocks[..., :256].reshape(*shape, 8, 4, PANEL, 4))
        q = low | ((high.reshape(low.shape) & 3) << 4)
        scales = units[..., 32:288].view(np.int8).reshape(*shape, 8, 2, PANEL, 1).astype(np.float32)
        values = _halves(units, 0) * np.repeat(scales, 4, axis=3) * (q.astype(np.float32) - 32)
    else:
        q = _nibble_bytes(units[..., 320:2368].reshape(*shape, 8, 4, PANEL, 4))
        if storage == "q5_k":
            bits = units[..., 2368:].reshape(*shape, 8, 1, PANEL, 4) >> np.arange(8, dtype=np.uint8)[:, None, None]
            q = q | ((bits & 1) << 4)
        six = units[..., 64:320].reshape(*shape, 2, 8, 1, PANEL, 1).astype(np.float32)
        values = _halves(units, 0) * six[:, :, 0] * q - _halves(units, 32) * six[:, :, 1]
    dense: np.ndarray = values.reshape(*shape, -1, PANEL, 4).transpose(0, 3, 1, 2, 4)
    return dense


def shape_of(part: np.ndarray | GgmlRows) -> tuple[int, int]:
    """(N, K) of a part as `pack` takes it."""
    if isinstance(part, GgmlRows):
        values, num_bytes = gguf_blocks.BLOCK_SIZES[part.type_name]
        return part.rows.shape[0], part.rows.shape[1] // num_bytes * values
    return part.shape[0], part.shape[1]


def _native_rows(format: str, part: np.ndarray | GgmlRows) -> np.ndarray:
    """The part in the form its packer reads: floats of the target type, or raw rows of the target block type."""
    if format in _UNITS:
        type_name = format.upper()
        if isinstance(part, GgmlRows):
            if part.type_name == type_name:
                return part.rows
            part = gguf_blocks.dequantize(part.type_name, part.rows)
        return gguf_blocks.quantize(type_name, np.asarray(part, np.float32))
    if isinstance(part, GgmlRows):
        part = gguf_blocks.dequantize(part.type_name, part.rows)
    return np.asarray(part, ml_dtypes.bfloat16 if format == "bf16" else np.float32)


_CHUNK_ROWS = 1024  # converted at a time, so that the float32 copy of a big tensor never exists


def native_chunks(format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Iterator[np.ndarray]:
    """The parts' rows in order, a thousand at a time: floats of the target type, or raw rows of the target block type."""
    for part in parts:
        for start in range(0, shape_of(part)[0], _CHUNK_ROWS):
            stop = start + _CHUNK_ROWS
            piece = GgmlRows(part.type_name, part.rows[start:stop]) if isinstance(part, GgmlRows) else part[start:stop]
            yield _native_rows(format, piece)


def _whole_panels(format: str, parts: Sequence[np.ndarray | GgmlRows]) -> Iterator[tuple[int, np.ndarray]]:
    """(first panel, rows) with the rows a multiple of 16, parts run together, the last one padded with zeros."""
    panel, held = 0, None
    for rows in native_chunks(format, parts):
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


def _pack_i8(rows: np.ndarray) -> np.ndarray:
    """Float32 rows -> panels of 8-bit integers of the turned rows, by the largest of each."""
    turned, width = rotation.rotate(rows), rows.shape[1]
    most = np.abs(turned).max(axis=1)
    q = np.rint(turned * np.divide(127, most, out=np.zeros_like(most), where=most > 0)[:, None]).astype(np.int8)
    out = np.empty((len(rows) // PANEL, 64 + width * PANEL), np.uint8)
    out[:, :64] = (most / np.float32(127 * width)).reshape(-1, PANEL).view(np.uint8)
    words = (q.view(np.uint8) ^ 128).view(np.uint32).reshape(-1, PANEL, width // 4)
    out[:, 64:] = np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.uint8).reshape(len(out), -1)
    return out


def _unpack_i8(weight: Weight) -> np.ndarray:
    num_rows, width = weight.shape
    panels = weight.data[: len(weight.data) - rotation.waves(width).nbytes].reshape(-(-num_rows // PANEL), -1)
    scales = np.ascontiguousarray(panels[:, :64]).view(np.float32)
    q = panels[:, 64:].reshape(len(panels), width // 4, PANEL, 4).transpose(0, 2, 1, 3).astype(np.float32) - 128
    rows = q.reshape(len(panels) * PANEL, width) * scales.reshape(-1, 1)
    return rotation.rotate(rows[:num_rows])


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


def _ordered(blocks: np.ndarray) -> np.ndarray:
    """Integers (panels, 16, units, 8, 32) of each output -> (panels, units, 8, j, 16, t), k = 4 j + t."""
    split = blocks.reshape(*blocks.shape[:-1], 8, 4)
    return split.transpose(0, 2, 3, 4, 1, 5)


def _pack_nibbles(q: np.ndarray) -> np.ndarray:
    """(..., 8, 16, 4) integers -> (..., 256) bytes of their low four bits."""
    packed = (q[..., :4, :, :] & 15) | (q[..., 4:, :, :] << 4)
    return packed.reshape(*q.shape[:-3], 256)


def _k_units(rows: np.ndarray, nbytes: int) -> np.ndarray:
    """Raw K-quant rows -> (panels, 16, units, bytes)."""
    return np.ascontiguousarray(rows).reshape(len(rows) // PANEL, PANEL, -1, nbytes)


def _lanes(values: np.ndarray) -> np.ndarray:
    """(panels, 16, units, ...) -> (panels, units, ..., 16) -> bytes (panels, units, n)."""
    moved = np.ascontiguousarray(np.moveaxis(values, 1, -1))
    return moved.view(np.uint8).reshape(*moved.shape[:2], -1)


def _pack_four_bit_k(rows: np.ndarray, type_name: str) -> np.ndarray:
    units = _k_units(rows, gguf_blocks.BLOCK_SIZES[type_name][1])
    flat = units.reshape(-1, units.shape[-1])
    scales, minima = (s.reshape(*units.shape[:3], 8).astype(np.uint8) for s in gguf_blocks.six_bit_scales(flat[:, 4:16]))
    q = _ordered(gguf_blocks.K_INTEGERS[type_name](flat).reshape(*units.shape[:3], 8, 32))
    nibbles = _pack_nibbles(q).reshape(*q.shape[:2], -1)
    head = [_lanes(np.ascontiguousarray(units[..., at : at + 2]).view(np.uint16)) for at in (0, 2)]
    parts = [*head, _lanes(scales), _lanes(minima), nibbles]
    if type_name == "Q5_K":
        shifts = np.arange(8, dtype=np.uint8)[:, None, None]
        parts.append(np.bitwise_or.reduce((q >> 4) << shifts, axis=3).reshape(*q.shape[:2], -1))
    return np.concatenate(parts, axis=2)


def _pack_q4_k(rows: np.ndarray) -> np.ndarray:
    return _pack_four_bit_k(rows, "Q4_K")


def _pack_q5_k(rows: np.ndarray) -> np.ndarray:
    return _pack_four_bit_k(rows, "Q5_K")


def _pack_q6_k(rows: np.ndarray) -> np.ndarray:
    units = _k_units(rows, gguf_blocks.BLOCK_SIZES["Q6_K"][1])
    q = _ordered(gguf_blocks.K_INTEGERS["Q6_K"](units.reshape(-1, units.shape[-1])).reshape(*units.shape[:3], 8, 32))
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None, None]
    high = np.bitwise_or.reduce((q >> 4).reshape(*q.shape[:3], 2, 4, PANEL, 4) << shifts, axis=4).reshape(*q.shape[:3], 128)
    blocks = np.concatenate([_pack_nibbles(q), high], axis=3).reshape(*q.shape[:2], -1)
    d, scales = np.ascontiguousarray(units[..., 208:210]).view(np.uint16), units[..., 192:208]
    return np.concatenate([_lanes(d), _lanes(scales), blocks], axis=2)


_PACKERS = {
    "f32": _pack_f32,
    "bf16": _pack_bf16,
    "i8": _pack_i8,
    "q8_0": _pack_q8_0,
    "q4_0": _pack_q4_0,
    "q4_1": _pack_q4_1,
    "q4_k": _pack_q4_k,
    "q5_k": _pack_q5_k,
    "q6_k": _pack_q6_k,
}
