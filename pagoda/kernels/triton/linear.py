"""Products with a weight: the vendor's library where weights are plain floats, one Triton kernel for everything else.

The Triton kernel computes tiles of y^T = W x^T: the weight is the left operand, which tensor cores read from registers, so
that bytes are unpacked where they are used; activations are the right one.

    w (BLOCK_N outputs, k)  x  x^T (k, BLOCK_M rows)  ->  float32 (BLOCK_N, BLOCK_M), all of K in one order

One row, plain floats or not, has a kernel without tensor cores (`one_row.py`). Few rows leave most of a GPU without work where there are few outputs: K is cut into parts then, as many as N and K say, each of which
leaves float32 sums that a second kernel adds up in order. The order of accumulation is fixed by N and K and never by the number of rows
(up to 16, and beyond). With `fixed_tiles` plain floats go through it too
and the tile is always the same, so a row's result does not depend on its neighbours. Without, products of many rows with
a quantized weight dequantize it and call the library, which computes faster than unpacking once per tile of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.embedding import dequantize
from pagoda.kernels.triton.launch import arch_of, cdiv, check_rows, dot, index, launch, narrow
from pagoda.kernels.triton.one_row import product_of_one_row
from pagoda.kernels.triton.weight import DeviceWeight

__all__ = ["MANY_ROWS", "linear", "parts_of"]

Array = Any
MANY_ROWS = 256  # from here on a quantized weight is dequantized first
_BLOCK_N = 64
_FEW_ROWS = 16
_BLOCK_K_OF_FEW = {16: 64, 8: 128, 4: 256}
_WANTED_PROGRAMS, _MOST_PARTS, _SHORTEST_PART = 1024, 4, 512
_MERGED = 1024  # sums a program of the second kernel adds up


def parts_of(num_outputs: int, width: int) -> int:
    """Parts that K is cut into for few rows: 1, 2 or 4."""
    parts = 1
    while parts < _MOST_PARTS and cdiv(num_outputs, _BLOCK_N) * parts * 2 <= _WANTED_PROGRAMS and width // (parts * 2) >= _SHORTEST_PART:
        parts *= 2
    return parts


@triton.jit
def _expand(values_NG, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """One number per group -> one per value, (BLOCK_N, WIDTH)."""
    wide = tl.broadcast_to(values_NG[:, :, None], (BLOCK_N, WIDTH // GROUP, GROUP))
    return tl.reshape(wide, (BLOCK_N, WIDTH))


@triton.jit
def _add_product(
    acc, q, k_first, x, scales, minima, row, col, num_rows, num_outputs, width, x_stride, scale_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """acc + w x^T for WIDTH values from `k_first` on, of which `q` is what the weight stores: all, or of 4 bits every other 64."""
    HALF: tl.constexpr = 64 if BITS == 4 else WIDTH
    i = tl.arange(0, WIDTH)
    k = k_first + i // HALF * 2 * HALF + i % HALF
    x_KM = tl.load(x + row.to(tl.int64)[None, :] * x_stride + k[:, None], mask=(row < num_rows)[None, :] & (k < width)[:, None], other=0.0)
    if BITS == 16:
        w_NK = q
    else:
        part = tl.arange(0, WIDTH // GROUP)
        group = k_first // GROUP + part // (HALF // GROUP) * 2 * (HALF // GROUP) + part % (HALF // GROUP)
        at = group.to(tl.int64)[None, :] * scale_stride + col[:, None]
        live = (col < num_outputs)[:, None] & (group * GROUP < width)[None, :]
        scale = tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
        w_NK = (q.to(tl.int32) - OFFSET).to(tl.float32) * _expand(scale, GROUP, BLOCK_N, WIDTH)
        if HAS_MIN:
            w_NK += _expand(tl.load(minima + at, mask=live, other=0.0).to(tl.float32), GROUP, BLOCK_N, WIDTH)
        w_NK = narrow(w_NK, x.dtype.element_ty)
    return dot(w_NK, x_KM, acc)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, w, scales, minima, bias, residual, out, sums,
    num_rows, num_outputs, width, x_stride, w_stride, scale_stride, residual_stride, out_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # > 1: this program does one of them, and leaves it in `sums`
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = w + tl.minimum(col, num_outputs - 1).to(tl.int64)[:, None] * w_stride
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = 0
    end = width
    if PARTS > 1:
        per_part = (width + PARTS * BLOCK_K - 1) // (PARTS * BLOCK_K) * BLOCK_K
        begin = tl.program_id(2) * per_part
        end = tl.minimum(begin + per_part, width)
    for first in range(index(begin), index(end), BLOCK_K):
        if BITS == 4:
            at = first // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
            byte = tl.load(line + at, mask=at < w_stride, other=0)
            acc = _add_product(acc, byte & 15, first, x, scales, minima, row, col, num_rows, num_outputs, width, x_stride, scale_stride,
                               BITS, GROUP, OFFSET, HAS_MIN, BLOCK_N, BLOCK_K // 2)  # fmt: skip
            acc = _add_product(acc, byte >> 4, first + 64, x, scales, minima, row, col, num_rows, num_outputs, width, x_stride,
                               scale_stride, BITS, GROUP, OFFSET, HAS_MIN, BLOCK_N, BLOCK_K // 2)  # fmt: skip
        else:
            k = first + tl.arange(0, BLOCK_K)[None, :]
            if BITS == 16:
                q = tl.load(line + k, mask=k < width, other=0.0)
            else:
                q = tl.load(line + k)
            acc = _add_product(acc, q, first, x, scales, minima, row, col, num_rows, num_outputs, width, x_stride, scale_stride,
                               BITS, GROUP, OFFSET, HAS_MIN, BLOCK_N, BLOCK_K)  # fmt: skip
    live = (col < num_outputs)[:, None] & (row < num_rows)[None, :]
    if PARTS > 1:
        line_of = (tl.program_id(2) * num_rows + row).to(tl.int64)
        tl.store(sums + line_of[None, :] * num_outputs + col[:, None], acc, mask=live)
        return
    if HAS_BIAS:
        acc += tl.load(bias + col, mask=col < num_outputs, other=0.0).to(tl.float32)[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual + row.to(tl.int64)[None, :] * residual_stride + col[:, None], mask=live, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[None, :] * out_stride + col[:, None], narrow(acc, out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_parts_kernel(
    sums, bias, residual, out, num_rows, num_outputs, residual_stride, out_stride,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < num_outputs
    y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(sums + (part * num_rows + row) * num_outputs + col, mask=live, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias + col, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + row * residual_stride + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, narrow(y, out.dtype.element_ty), mask=live)


@implements("linear", device="cuda")
def linear(
    x_TK: Array,
    weight: DeviceWeight,
    bias_N: Array | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    check_rows("linear", x=x_TK, residual=residual, out=out)
    if x_TK.shape[0] == 1 and not weight.fixed_tiles:
        out = torch.empty((1, weight.shape[0]), dtype=x_TK.dtype, device=x_TK.device) if out is None else out
        product_of_one_row(x_TK, weight, bias_N, residual, out)
        return out
    if weight.bits == 16 and not weight.fixed_tiles:
        return _library_product(x_TK, weight.data, bias_N, residual, out)
    rows = x_TK.shape[0]
    if rows >= MANY_ROWS and not weight.fixed_tiles:
        return _library_product(x_TK, dequantize(weight), bias_N, residual, out)
    num_outputs, width = weight.shape
    out = torch.empty((rows, num_outputs), dtype=x_TK.dtype, device=x_TK.device) if out is None else out
    is_few = rows <= _FEW_ROWS and not weight.fixed_tiles
    block_m = 32 if weight.fixed_tiles else 16 if is_few else 64
    parts = parts_of(num_outputs, width) if is_few else 1
    block_k = _BLOCK_K_OF_FEW[weight.bits] if is_few and arch_of(x_TK).backend == "cuda" else 128 if weight.bits == 4 else 64
    sums = out if parts == 1 else torch.empty((parts, rows, num_outputs), dtype=torch.float32, device=x_TK.device)
    scales = weight.data if weight.scales is None else weight.scales
    bias, added = x_TK if bias_N is None else bias_N, out if residual is None else residual
    flags = {"HAS_BIAS": bias_N is not None, "HAS_RESIDUAL": residual is not None}
    launch(
        _linear_kernel, (cdiv(rows, block_m), cdiv(num_outputs, _BLOCK_N), parts),
        x_TK, weight.data, scales, scales if weight.minima is None else weight.minima, bias, added, out, sums, rows, num_outputs, width,
        x_TK.stride(0), weight.data.stride(0), scales.stride(0), added.stride(0), out.stride(0),
        BITS=weight.bits, GROUP=weight.group, OFFSET=weight.offset, HAS_MIN=weight.minima is not None,
        BLOCK_M=block_m, BLOCK_N=_BLOCK_N, BLOCK_K=block_k, PARTS=parts,
        num_warps=4, num_stages=3 if block_k > 64 else 4, **flags,
    )  # fmt: skip
    if parts > 1:
        launch(
            _sum_parts_kernel, (rows, cdiv(num_outputs, _MERGED)), sums, bias, added, out, rows, num_outputs, added.stride(0), out.stride(0),
            PARTS=parts, BLOCK=_MERGED, num_warps=4, **flags,
        )  # fmt: skip
    return out


def _library_product(x_TK: Array, w_NK: Array, bias_N: Array | None, residual: Array | None, out: Array | None) -> Array:
    """x W^T by the vendor's library; one addend is fused into the product, the second added after it."""
    addends = [y.to(x_TK.dtype) for y in (residual, bias_N) if y is not None]
    if not addends:
        return torch.mm(x_TK, w_NK.t()) if out is None else torch.mm(x_TK, w_NK.t(), out=out)
    y = torch.addmm(addends[0], x_TK, w_NK.t()) if out is None else torch.addmm(addends[0], x_TK, w_NK.t(), out=out)
    return y if len(addends) == 1 else y.add_(addends[1])
