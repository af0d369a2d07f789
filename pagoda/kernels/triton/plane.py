"""A plane of the paged cache on a GPU: the pages of one layer, what `kernels/kv.py` is for a CPU.

    k, v   (num_blocks, num_kv_heads, block_size, head_dim)      bfloat16, float16, or uint8 for "fp8_e4m3"

A program works for one key head: within a page its keys are one contiguous piece (16 tokens of 128 bfloat16 numbers: 4
KiB), whatever the number of heads. A slot is `block_id * block_size + offset`, as on a CPU.

fp8_e4m3 holds round(x / scale) in the OCP format (4 bits of exponent, 3 of mantissa, largest 448, no infinities); larger
numbers are clipped. Kernels code and decode it with integer arithmetic, because compilers know the type only on the
GPUs that multiply in it: the bits are the same on every GPU.

`split_tokens` is how many tokens of a context one program of a decoding step reads. It is constant for the engine, so
partial results lie at the same positions whatever the batch, and are summed in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["DEVICE_KV_TYPES", "DevicePlane", "allocate_device_plane", "device_bytes_per_block", "read_device_tokens"]

DEVICE_KV_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8_e4m3": torch.uint8}


@dataclass(frozen=True, eq=False)
class DevicePlane:
    dtype: str
    block_size: int
    num_blocks: int
    num_kv_heads: int
    head_dim: int
    k: Any
    v: Any
    k_scale: float = 1.0
    v_scale: float = 1.0
    split_tokens: int = 256
    fixed_tiles: bool = False  # --batch-invariant: prefill computes as decode does, tile by tile
    backend: str = "triton"  # or "sdpa": what attends over it

    @property
    def nbytes(self) -> int:
        return int(self.k.nbytes + self.v.nbytes)


def device_bytes_per_block(*, dtype: str, block_size: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes one page takes in one plane, keys and values together."""
    return 2 * block_size * num_kv_heads * head_dim * DEVICE_KV_TYPES[dtype].itemsize


def allocate_device_plane(
    *,
    dtype: str,
    block_size: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    device: Any,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    split_tokens: int = 256,
    fixed_tiles: bool = False,
    backend: str = "triton",
) -> DevicePlane:
    """A zeroed plane. ValueError for sizes the kernels cannot work with."""
    if dtype not in DEVICE_KV_TYPES:
        raise ValueError(f"`dtype` is `{dtype}`; a KV cache on a GPU is one of {', '.join(DEVICE_KV_TYPES)}")
    if block_size < 8 or block_size & (block_size - 1):
        raise ValueError(f"`block_size` is {block_size}; on a GPU it must be a power of two, 8 at least")
    widest = 256 if backend == "triton" else 512
    if head_dim % 8 or not 8 <= head_dim <= widest:
        raise ValueError(f"`head_dim` is {head_dim}; on a GPU it must be a multiple of 8 and at most {widest}")
    if split_tokens % 64 or split_tokens <= 0:
        raise ValueError(f"`split_tokens` is {split_tokens}; it must be a multiple of 64")
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    k, v = (torch.zeros(shape, dtype=DEVICE_KV_TYPES[dtype], device=device) for _ in range(2))
    return DevicePlane(dtype, block_size, num_blocks, num_kv_heads, head_dim, k, v, k_scale, v_scale, split_tokens, fixed_tiles, backend)


def read_device_tokens(plane: DevicePlane, block_ids: Any, num_tokens: int) -> tuple[Any, Any]:
    """The first `num_tokens` keys and values of a sequence -> two float32 (num_tokens, num_kv_heads, head_dim)."""
    ids = torch.as_tensor(block_ids, dtype=torch.int64, device=plane.k.device)[: -(-num_tokens // plane.block_size)]
    sides = []
    for pages, scale in ((plane.k, plane.k_scale), (plane.v, plane.v_scale)):
        x = pages[ids]
        x = x.view(torch.float8_e4m3fn).float() * scale if plane.dtype == "fp8_e4m3" else x.float()
        sides.append(x.transpose(1, 2).reshape(-1, plane.num_kv_heads, plane.head_dim)[:num_tokens])
    return sides[0], sides[1]
