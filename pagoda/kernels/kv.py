"""A plane of the paged key-value cache: the pages of one layer, and where each number lies in them.

A slot is `block_id * block_size + offset`. Tokens are kept in groups of 16, the lanes of a vector:

    k float32   (num_blocks, num_kv_heads, block_size / 16, head_dim,     16)      one d of 16 keys side by side
    k bfloat16  (num_blocks, num_kv_heads, block_size / 16, head_dim / 2, 16, 2)   pairs of d, for the dot instruction
    v float32   (num_blocks, num_kv_heads, block_size, head_dim)                   row-major by token
    v bfloat16  (num_blocks, num_kv_heads, block_size / 2, head_dim, 2)            pairs of tokens, likewise

so q.k is computed for 16 keys at once with no reduction, and p.v streams whole rows. Pages are touched when they are
first written, so a plane may be larger than the memory used so far.
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
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


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
    return 2 * block_size * num_kv_heads * head_dim * DTYPES[dtype].itemsize


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
    kind = DTYPES[dtype]
    groups = (num_blocks, num_kv_heads, block_size // LANES)
    k_shape = (*groups, head_dim, LANES) if dtype == "float32" else (*groups, head_dim // 2, LANES, 2)
    rows = (num_blocks, num_kv_heads, block_size)
    v_shape = (*rows, head_dim) if dtype == "float32" else (*rows[:2], block_size // 2, head_dim, 2)
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
    """Keys of whole blocks in reading order -> (blocks, num_kv_heads, block_size, head_dim) in the plane's type."""
    k: np.ndarray = np.moveaxis(plane.k[block_ids], 4, 3)  # lanes before what is left of head_dim
    shape = (len(block_ids), plane.num_kv_heads, plane.block_size, plane.head_dim)
    return np.reshape(k, shape)


def values_by_token(plane: KvPlane, block_ids: np.ndarray) -> np.ndarray:
    """Values of whole blocks -> (blocks, num_kv_heads, block_size, head_dim) in the plane's type."""
    v = plane.v[block_ids]
    if plane.dtype == "bfloat16":  # (n, H, B/2, D, 2) -> (n, H, B/2, 2, D)
        v = np.moveaxis(v, 4, 3)
    return v.reshape(len(block_ids), plane.num_kv_heads, plane.block_size, plane.head_dim)


def read_tokens(plane: KvPlane, block_ids: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_tokens` keys and values of a sequence -> two float32 (num_tokens, num_kv_heads, head_dim)."""
    ids = np.asarray(block_ids)[: -(-num_tokens // plane.block_size)]
    sides = []
    for x in (keys_by_token(plane, ids), values_by_token(plane, ids)):
        rows = x.astype(np.float32).transpose(0, 2, 1, 3).reshape(-1, plane.num_kv_heads, plane.head_dim)
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
