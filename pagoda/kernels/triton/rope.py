"""Rotary embedding: a program turns a few heads of one token, reading both halves before it writes either."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.launch import cdiv, check_rows, launch, narrow, next_power_of_2

__all__ = ["rope"]

Array = Any
_TILE = 1024  # pairs a program turns


@triton.jit
def _rope_kernel(
    x, positions, cos_sin, out,
    x_stride, table_stride, out_stride, num_heads,
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head that turn
    HALF_PAD: tl.constexpr,
    REST_PAD: tl.constexpr,  # columns copied, padded; 0: none, or `out` is `x`
    HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF_PAD)[None, :]
    live = (head < num_heads) & (pair < HALF)
    angles = cos_sin + tl.load(positions + row).to(tl.int64) * table_stride
    cos = tl.load(angles + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(angles + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    source = x + row * x_stride + head * DIM + pair
    a = tl.load(source, mask=live, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=live, other=0.0).to(tl.float32)
    target = out + row * out_stride + head * DIM + pair
    tl.store(target, narrow(a * cos - b * sin, out.dtype.element_ty), mask=live)
    tl.store(target + HALF, narrow(b * cos + a * sin, out.dtype.element_ty), mask=live)
    if REST_PAD > 0:
        col = 2 * HALF + tl.arange(0, REST_PAD)[None, :]
        kept = (head < num_heads) & (col < DIM)
        rest = tl.load(x + row * x_stride + head * DIM + col, mask=kept, other=0.0)
        tl.store(out + row * out_stride + head * DIM + col, rest, mask=kept)


@implements("rope", device="cuda")
def rope(x_TD: Array, positions_T: Array, cos_sin_PR: Array, *, head_dim: int, out: Array | None = None) -> Array:
    in_place = out is x_TD
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if out is None else out
    check_rows("rope", x=x_TD, positions=positions_T, out=out)
    rows, width = x_TD.shape
    half, heads = cos_sin_PR.shape[1] // 2, width // head_dim
    rest = 0 if in_place else head_dim - 2 * half
    tile = min(next_power_of_2(heads), max(1, _TILE // next_power_of_2(half)))
    launch(
        _rope_kernel, (rows, cdiv(heads, tile)),
        x_TD, positions_T, cos_sin_PR, out, x_TD.stride(0), cos_sin_PR.stride(0), out.stride(0), heads,
        DIM=head_dim, HALF=half, HALF_PAD=next_power_of_2(half), REST_PAD=next_power_of_2(rest) if rest else 0,
        HEADS=tile, num_warps=4,
    )  # fmt: skip
    return out
