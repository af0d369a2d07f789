"""RMS normalisation over groups of columns, with the residual added first where one is given.

A program takes a tile of groups, so that norms over heads of 64 or 128 columns fill a block as well as one over a row:

    group number g = row * (D / G) + group in row        tile (ROWS, GROUP padded to a power of two)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.launch import cdiv, check_rows, launch, narrow, next_power_of_2

__all__ = ["rms_norm"]

Array = Any
_TILE = 2048  # elements a program normalises when groups are small


@triton.jit(do_not_specialize=["num_groups"])
def _rms_norm_kernel(
    x, residual, weight, out,
    x_stride, residual_stride, out_stride,
    num_groups, eps,
    PER_ROW: tl.constexpr,  # groups in a row
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,  # the power of two a tile needs
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, GROUP_PAD)[None, :]
    live = (group < num_groups) & (col < GROUP)
    row = (group // PER_ROW).to(tl.int64)
    at = (group % PER_ROW) * GROUP + col
    value = tl.load(x + row * x_stride + at, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual + row * residual_stride + at
        value += tl.load(place, mask=live, other=0.0).to(tl.float32)
        tl.store(place, narrow(value, residual.dtype.element_ty), mask=live)
    mean_square = tl.sum(value * value, axis=1) / GROUP
    gain = tl.load(weight + col, mask=col < GROUP, other=0.0).to(tl.float32)
    y = value * (1.0 / tl.sqrt(mean_square + eps))[:, None] * gain
    tl.store(out + row * out_stride + at, narrow(y, out.dtype.element_ty), mask=live)


@implements("rms_norm", device="cuda")
def rms_norm(
    x_TD: Array, weight_G: Array, *, eps: float, residual: Array | None = None, out: Array | None = None
) -> Array:
    out = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if out is None else out
    check_rows("rms_norm", x=x_TD, residual=residual, out=out)
    rows, width = x_TD.shape
    group = weight_G.shape[0]
    padded = next_power_of_2(group)
    tile = max(1, _TILE // padded)
    held = x_TD if residual is None else residual
    launch(
        _rms_norm_kernel, (cdiv(rows * (width // group), tile),),
        x_TD, held, weight_G, out, x_TD.stride(0), held.stride(0), out.stride(0), rows * (width // group), eps,
        PER_ROW=width // group, GROUP=group, GROUP_PAD=padded, ROWS=tile, HAS_RESIDUAL=residual is not None,
        num_warps=4 if padded <= 4096 else 8 if padded <= 8192 else 16,
    )  # fmt: skip
    return out
