"""The ops that torch has a good kernel for, and soft capping.

`add`, `scale`, `gather_rows` are one torch kernel each, which graphs capture like any other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.launch import cdiv, check_rows, launch, narrow, next_power_of_2, tanh

__all__ = ["add", "empty_like_rows", "gather_rows", "scale", "soft_cap"]

Array = Any
_TILE = 1024


@triton.jit
def _soft_cap_kernel(x, out, x_stride, out_stride, width, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + col, mask=col < width, other=0.0).to(tl.float32)
    y = cap * tanh(value / cap)
    tl.store(out + row * out_stride + col, narrow(y, out.dtype.element_ty), mask=col < width)


@implements("soft_cap", device="cuda")
def soft_cap(x_TD: Array, cap: float, *, out: Array | None = None) -> Array:
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if out is None else out
    check_rows("soft_cap", x=x_TD, out=out)
    rows, width = x_TD.shape
    block = min(_TILE, next_power_of_2(width))
    launch(
        _soft_cap_kernel, (rows, cdiv(width, block)), x_TD, out, x_TD.stride(0), out.stride(0), width, float(cap),
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@implements("add", device="cuda")
def add(x_TD: Array, y_TD: Array, *, out: Array | None = None) -> Array:
    return torch.add(x_TD, y_TD, out=out)


@implements("scale", device="cuda")
def scale(x_TD: Array, factor: float, *, out: Array | None = None) -> Array:
    return torch.mul(x_TD, factor, out=out)


@implements("gather_rows", device="cuda")
def gather_rows(x_TD: Array, idx_R: Array) -> Array:
    return torch.index_select(x_TD, 0, idx_R)


@implements("empty_like_rows", device="cuda")
def empty_like_rows(x_TD: Array, cols: int) -> Array:
    """Of the type of `x_TD`, in which a GPU computes."""
    return torch.empty((x_TD.shape[0], cols), dtype=x_TD.dtype, device=x_TD.device)
