"""Readable codecs for the block formats of GGUF files: raw rows of bytes <-> float32.

Every format stores K values of a row as K / block_size blocks, each a little record of scales and packed integers.
Dequantizers are vectorised over all blocks of a matrix and are the definition of what a stored weight means; types
the kernels do not keep packed are turned into floats with them at load. Quantizers (round to nearest) exist for the
three formats the kernels compute on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

__all__ = ["BLOCK_SIZES", "K_INTEGERS", "dequantize", "quantize", "six_bit_scales"]

Blocks: TypeAlias = np.ndarray  # uint8 (num_blocks, bytes per block)
Values: TypeAlias = Any  # float32 (num_blocks, values per block); arithmetic on arrays is untyped


def _f16(blocks: Blocks, at: int) -> Values:
    """The half float at byte `at` of each block -> float32 (n, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(qs: np.ndarray) -> np.ndarray:
    """16 bytes -> 32 values: all low nibbles, then all high nibbles."""
    return np.concatenate([qs & 15, qs >> 4], axis=1)


def _fifth_bits(blocks: Blocks, at: int) -> np.ndarray:
    """32 bits stored little-endian at byte `at` -> (n, 32) of 0 or 16."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(b: Blocks) -> Values:
    return _f16(b, 0) * (_nibbles(b[:, 2:18]).astype(np.float32) - 8)


def _q4_1(b: Blocks) -> Values:
    return _f16(b, 0) * _nibbles(b[:, 4:20]).astype(np.float32) + _f16(b, 2)


def _q5_0(b: Blocks) -> Values:
    q = _nibbles(b[:, 6:22]) | _fifth_bits(b, 2)
    return _f16(b, 0) * (q.astype(np.float32) - 16)


def _q5_1(b: Blocks) -> Values:
    q = _nibbles(b[:, 8:24]) | _fifth_bits(b, 4)
    return _f16(b, 0) * q.astype(np.float32) + _f16(b, 2)


def _q8_0(b: Blocks) -> Values:
    return _f16(b, 0) * b[:, 2:34].view(np.int8).astype(np.float32)


def _two_bit_planes(qs: np.ndarray) -> np.ndarray:
    """64 bytes -> (n, 2 halves, 4 shifts, 32): the order in which Q2_K and Q3_K store their values."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    return (qs.reshape(-1, 2, 1, 32) >> shifts) & 3


def _q2_k(b: Blocks) -> Values:
    scales, d, dmin = b[:, :16], _f16(b, 80), _f16(b, 82)
    q = _two_bit_planes(b[:, 16:80]).reshape(-1, 16, 16).astype(np.float32)
    step, offset = d * (scales & 15), dmin * (scales >> 4)
    return (step[:, :, None] * q - offset[:, :, None]).reshape(-1, 256)


def _q3_k(b: Blocks) -> Values:
    hmask, packed, d = b[:, :32], b[:, 96:108], _f16(b, 108)
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, :, None]
    high = ((packed[:, None, 8:12] >> shifts) & 3).reshape(-1, 16)
    scales = (low | (high << 4)).astype(np.float32) - 32
    bits = (hmask[:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    q = _two_bit_planes(b[:, 32:96]).reshape(-1, 8, 32).astype(np.float32) - 4 * (1 - bits.astype(np.float32))
    return ((d * scales)[:, :, None] * q.reshape(-1, 16, 16)).reshape(-1, 256)


def six_bit_scales(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """12 bytes -> 8 scales and 8 minima of 6 bits each, as Q4_K and Q5_K store them."""
    scales = np.concatenate([s[:, :4] & 63, (s[:, 8:12] & 15) | ((s[:, :4] >> 6) << 4)], axis=1)
    minima = np.concatenate([s[:, 4:8] & 63, (s[:, 8:12] >> 4) | ((s[:, 4:8] >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _four_bit_k(b: Blocks, q: np.ndarray) -> Values:
    scales, minima = six_bit_scales(b[:, 4:16])
    step, offset = _f16(b, 0) * scales, _f16(b, 2) * minima
    return (step[:, :, None] * q.astype(np.float32) - offset[:, :, None]).reshape(-1, 256)


def _nibble_planes(qs: np.ndarray) -> np.ndarray:
    """128 bytes -> (n, 8, 32): each run of 32 bytes gives its low nibbles, then its high nibbles."""
    runs = qs.reshape(-1, 4, 1, 32)
    return (np.concatenate([runs & 15, runs >> 4], axis=2)).reshape(-1, 8, 32)


def _q4_k_integers(b: Blocks) -> np.ndarray:
    return _nibble_planes(b[:, 16:144])


def _q5_k_integers(b: Blocks) -> np.ndarray:
    bits = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return np.asarray(_nibble_planes(b[:, 48:176]) | (bits << 4))


def _q6_k_integers(b: Blocks) -> np.ndarray:
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    return np.asarray(low | (high << 4))


K_INTEGERS = {"Q4_K": _q4_k_integers, "Q5_K": _q5_k_integers, "Q6_K": _q6_k_integers}
"""Type name -> function of blocks (n, bytes) that gives the stored integers, uint8, 256 a block, in order of K."""


def _q4_k(b: Blocks) -> Values:
    return _four_bit_k(b, _q4_k_integers(b))


def _q5_k(b: Blocks) -> Values:
    return _four_bit_k(b, _q5_k_integers(b))


def _q6_k(b: Blocks) -> Values:
    q = _q6_k_integers(b).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = b[:, 192:208].view(np.int8).astype(np.float32)
    return ((_f16(b, 208) * scales)[:, :, None] * q).reshape(-1, 256)


def _f16_row(b: Blocks) -> Values:
    return np.ascontiguousarray(b).view(np.float16).astype(np.float32)


def _bf16_row(b: Blocks) -> Values:
    return (np.ascontiguousarray(b).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _f32_row(b: Blocks) -> Values:
    return np.ascontiguousarray(b).view(np.float32)


_DECODERS: dict[str, tuple[int, int, Callable[[Blocks], Values]]] = {  # values and bytes a block, decoder
    "F32": (1, 4, _f32_row),
    "F16": (1, 2, _f16_row),
    "BF16": (1, 2, _bf16_row),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "Q2_K": (256, 84, _q2_k),
    "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}

BLOCK_SIZES: dict[str, tuple[int, int]] = {name: row[:2] for name, row in _DECODERS.items()}
"""Type name -> (values per block, bytes per block) of every type that can be dequantized."""


def dequantize(type_name: str, rows: np.ndarray) -> np.ndarray:
    """Raw rows uint8 (N, bytes per row) -> float32 (N, K). ValueError for a type without a decoder or a torn row."""
    if type_name not in _DECODERS:
        raise ValueError(f"block type `{type_name}` has no decoder; known: {', '.join(_DECODERS)}")
    _, num_bytes, decode = _DECODERS[type_name]
    if rows.shape[1] % num_bytes:
        raise ValueError(f"a row of {rows.shape[1]} bytes is not a whole number of {num_bytes}-byte `{type_name}` blocks")
    with np.errstate(invalid="ignore", over="ignore"):  # a corrupt scale may be anything; NaN is caught at the logits
        values: np.ndarray = decode(np.ascontiguousarray(rows).reshape(-1, num_bytes))
    return values.reshape(rows.shape[0], -1)


def quantize(type_name: str, w_NK: np.ndarray) -> np.ndarray:
    """float32 (N, K), K a multiple of 32 -> raw rows of Q4_0, Q4_1 or Q8_0, rounded to the nearest step."""
    x = np.ascontiguousarray(w_NK, np.float32).reshape(-1, 32)
    if type_name == "Q4_1":
        low, low_f16 = _as_stored(x.min(axis=1, keepdims=True))
        step, step_f16 = _as_stored((x.max(axis=1, keepdims=True) - low) / 15)
        head = [step_f16, low_f16]
        q = _rounded(x - low, step, 0, 15)
    elif type_name == "Q4_0":
        step, step_f16 = _as_stored(np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1) / -8)
        head = [step_f16]
        q = _rounded(x, step, -8, 7) + 8
    elif type_name == "Q8_0":
        step, step_f16 = _as_stored(np.abs(x).max(axis=1, keepdims=True) / 127)
        parts = [step_f16.view(np.uint8), _rounded(x, step, -127, 127).astype(np.int8).view(np.uint8)]
        return np.concatenate(parts, axis=1).reshape(w_NK.shape[0], -1)
    else:
        raise ValueError(f"no quantizer for `{type_name}`; known: Q4_0, Q4_1, Q8_0")
    q = q.astype(np.uint8)
    packed = q[:, :16] | (q[:, 16:] << 4)
    blocks = np.concatenate([h.view(np.uint8) for h in head] + [packed], axis=1)
    return np.reshape(blocks, (w_NK.shape[0], -1))


def _as_stored(values: Values) -> tuple[Values, Values]:
    """A scale as the half float a block keeps, read back and raw: integers are rounded to multiples of what is stored."""
    halves = values.astype(np.float16)
    return halves.astype(np.float32), halves


def _rounded(x: np.ndarray, step: np.ndarray, low: int, high: int) -> Values:
    return np.clip(np.rint(x / np.where(step == 0, 1, step)), low, high)
