"""A plane of the paged key-value cache: the pages of one layer, and where each number lies in them.

A slot is `block_id * block_size + offset`. Tokens are kept in groups of 16, the lanes of a vector:

    k float32   (num_blocks, num_kv_heads, block_size / 16, head_dim,     16)      one d of 16 keys side by side
    k bfloat16  (num_blocks, num_kv_heads, block_size / 16, head_dim / 2, 16, 2)   pairs of d, for the dot instruction
    v float32   (num_blocks, num_kv_heads, block_size, head_dim)                   row-major by token
    v bfloat16  (num_blocks, num_kv_heads, block_size / 2, head_dim, 2)            pairs of tokens, likewise

In int8 a group is bytes, then 16 scales as float32; a number is scale * byte, and the scale is a token's and head's own:

    k int8      (num_blocks, num_kv_heads, block_size / 16, (head_dim + 4) * 16)   bytes [head_dim / 4][16][4], 128 added
    v int8      (num_blocks, num_kv_heads, block_size / 16, (head_dim + 4) * 16)   bytes [4][head_dim][4], signed

so q.k is computed for 16 keys at once with no reduction, and p.v streams whole rows. Pages are touched when they are
first written, so a plane may be larger than the memory used so far. A GPU's planes are drawn in `triton/plane.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from pagoda.kernels.memory import allocate

__all__ = [
    "DTYPES",
    "LANES",
    "KvPlane",
    "allocate_kv_plane",
    "bytes_per_block",
    "copy_blocks",
    "read_blocks",
    "read_tokens",
    "write_blocks",
]

LANES = 16
# What the arrays of a plane hold; of int8 bytes.
DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.uint8),
}
_SCALES_NBYTES = LANES * 4


@dataclass(frozen=True, eq=False)
class KvPlane:
    """Keys and values of one layer for `num_blocks` pages; layouts as drawn above."""

    dtype: str
    block_size: int
    num_blocks: int
    num_kv_heads: int
    head_dim: int
    k: np.ndarray
    v: np.ndarray

    @property
    def nbytes(self) -> int:
        return int(self.k.nbytes + self.v.nbytes)


def bytes_per_block(*, dtype: str, block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes one page takes in one plane, keys and values together."""
    scales = 2 * block_size // LANES * num_kv_heads * _SCALES_NBYTES if dtype == "int8" else 0
    return 2 * block_size * num_kv_heads * head_dim * DTYPES[dtype].itemsize + scales


def allocate_kv_plane(
    *, dtype: str, block_size: int, num_blocks: int, num_kv_heads: int, head_dim: int
) -> KvPlane:
    """A zeroed plane whose pages cost memory only once written. ValueError for sizes the layout cannot hold."""
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` is `{dtype}`; a KV cache is one of {', '.join(DTYPES)}")
    if block_size % LANES or block_size <= 0:
        raise ValueError(f"`block_size` is {block_size}; it must be a multiple of {LANES}")
    if head_dim % 2 or not 2 <= head_dim <= 512:
        raise ValueError(f"`head_dim` is {head_dim}; it must be even and at most 512")
    if dtype == "int8" and head_dim % 4:
        raise ValueError(f"`head_dim` is {head_dim}; an int8 cache needs a multiple of 4")
    kind = DTYPES[dtype]
    groups, rows = (num_blocks, num_kv_heads, block_size // LANES), (num_blocks, num_kv_heads, block_size)
    k_shape, v_shape = {
        "float32": ((*groups, head_dim, LANES), (*rows, head_dim)),
        "bfloat16": ((*groups, head_dim // 2, LANES, 2), (*rows[:2], block_size // 2, head_dim, 2)),
        "int8": ((*groups, head_dim * LANES + _SCALES_NBYTES),) * 2,
    }[dtype]
    return KvPlane(
        dtype=dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        k=_zeros(k_shape, kind),
        v=_zeros(v_shape, kind),
    )


def _zeros(shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
    return allocate(math.prod(shape) * kind.itemsize).view(kind).reshape(shape)


def keys_by_token(plane: KvPlane, block_ids: np.ndarray) -> np.ndarray:
    """Keys of whole blocks in reading order -> float32 (blocks, num_kv_heads, block_size, head_dim)."""
    k, shape = plane.k[block_ids], (len(block_ids), plane.num_kv_heads, plane.block_size, plane.head_dim)
    if plane.dtype == "int8":
        bytes_, scale = _split_int8(k)
        k = np.moveaxis(bytes_.reshape(*k.shape[:3], -1, LANES, 4), 4, 3).astype(np.float32) - 128
        found: np.ndarray = k.reshape(shape) * scale.reshape(*shape[:3], 1)
    else:
        found = np.moveaxis(k, 4, 3).reshape(shape).astype(np.float32)  # lanes before what is left of head_dim
    return found


def values_by_token(plane: KvPlane, block_ids: np.ndarray) -> np.ndarray:
    """Values of whole blocks -> float32 (blocks, num_kv_heads, block_size, head_dim)."""
    v, shape = plane.v[block_ids], (len(block_ids), plane.num_kv_heads, plane.block_size, plane.head_dim)
    if plane.dtype == "int8":
        bytes_, scale = _split_int8(v)
        fours = np.moveaxis(bytes_.view(np.int8).reshape(*v.shape[:3], LANES // 4, plane.head_dim, 4), 5, 4)
        found: np.ndarray = fours.reshape(shape) * scale.reshape(*shape[:3], 1)
    else:
        if plane.dtype == "bfloat16":  # (n, H, B/2, D, 2) -> (n, H, B/2, 2, D)
            v = np.moveaxis(v, 4, 3)
        found = v.reshape(shape).astype(np.float32)
    return found


def _split_int8(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> the bytes of each group, and its scales as float32 (.., 16)."""
    scales = np.ascontiguousarray(groups[..., -_SCALES_NBYTES:]).view(np.float32)
    return np.ascontiguousarray(groups[..., :-_SCALES_NBYTES]), scales


def to_int8(x_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as signed bytes and a scale each: x = scale * byte, the largest byte of a row 127.

    A row below 1e-30 becomes zero, of scale 1; one with an infinity or a NaN gets a scale of NaN. -> int8 (R, D), float32 (R,).
    """
    most = np.abs(x_RD).max(axis=1)
    is_bad, is_zero = ~np.isfinite(x_RD).all(axis=1), most < np.float32(1e-30)
    is_flat = is_bad | is_zero
    inverse = np.float32(127) / np.where(is_flat, np.float32(1), most)
    rounded = np.rint(np.where(is_flat[:, None], np.float32(0), x_RD) * inverse[:, None])
    scale = np.where(is_bad, np.float32(np.nan), np.where(is_zero, np.float32(1), most / np.float32(127)))
    return rounded.astype(np.int8), scale.astype(np.float32)


def read_tokens(plane: KvPlane, block_ids: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_tokens` keys and values of a sequence -> two float32 (num_tokens, num_kv_heads, head_dim)."""
    ids = np.asarray(block_ids)[: -(-num_tokens // plane.block_size)]
    sides = []
    for x in (keys_by_token(plane, ids), values_by_token(plane, ids)):
        rows = x.transpose(0, 2, 1, 3).reshape(-1, plane.num_kv_heads, plane.head_dim)
        sides.append(rows[:num_tokens])
    return sides[0], sides[1]


def copy_blocks(plane: KvPlane, src_ids: np.ndarray, dst_ids: np.ndarray) -> None:
    """Copies whole pages within the plane; all sources are read before anything is written."""
    plane.k[dst_ids] = plane.k[src_ids]
    plane.v[dst_ids] = plane.v[src_ids]


def read_blocks(plane: KvPlane, block_ids: np.ndarray) -> bytes:
    """The raw bytes of pages in order, keys of each page before its values; `write_blocks` takes them back."""
    n = len(block_ids)
    parts = [x[block_ids].reshape(n, -1).view(np.uint8) for x in (plane.k, plane.v)]
    return np.concatenate(parts, axis=1).tobytes()


def write_blocks(plane: KvPlane, block_ids: np.ndarray, data: bytes) -> None:
    """Fills pages from what `read_blocks` of an equally shaped plane returned. ValueError when the size differs."""
    n = len(block_ids)
    expected = n * plane.nbytes // plane.num_blocks
    if len(data) != expected:
        raise ValueError(f"{n} blocks of this plane take {expected} bytes, got {len(data)}")
    rows = np.frombuffer(data, np.uint8).reshape(n, -1)
    half = rows.shape[1] // 2
    kind = DTYPES[plane.dtype]
    plane.k[block_ids] = np.ascontiguousarray(rows[:, :half]).view(kind).reshape(n, *plane.k.shape[1:])
    plane.v[block_ids] = np.ascontiguousarray(rows[:, half:]).view(kind).reshape(n, *plane.v.shape[1:])
