"""The product of one row with a weight: every byte of the weight is read once, and nothing is left for tensor cores to share.

    acc (BLOCK_N outputs, GROUPS, GROUP) += w x, over all of K; then summed over the last two

A program has BLOCK_N outputs and runs over K. Each thread keeps sums of its own until the end, so the loop is loads and
multiply-adds, and many warps keep memory busy. Integers become floats without the conversion unit, which is four times slower than an
addition: added to the bits of 1.5 * 2^23 an integer is its last digits.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from pagoda.kernels.triton.launch import cdiv, index, launch, narrow, next_power_of_2
from pagoda.kernels.triton.weight import DeviceWeight

__all__ = ["product_of_one_row"]

Array = Any
_TILES = {16: (4, 1024), 8: (4, 1024), 4: (8, 512)}  # bits of a value -> outputs of a program, values of K it reads at a time


@triton.jit
def _float_of(q):
    """An integer of at most 8 bits as float32."""
    return (q.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _weighed(q_NGI, group_G, k_GI, x, scales, minima, col_N, num_groups, width, scale_stride, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr):
    """w x of a tile: groups `group_G` of outputs `col_N`, whose values are k_GI."""
    at = group_G.to(tl.int64)[None, :] * scale_stride + col_N[:, None]
    live = (group_G < num_groups)[None, :] & (col_N >= 0)[:, None]
    scale = tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
    w = _float_of(q_NGI.to(tl.int32) - OFFSET) * scale[:, :, None]
    if HAS_MIN:
        w += tl.load(minima + at, mask=live, other=0.0).to(tl.float32)[:, :, None]
    return w * tl.load(x + k_GI, mask=k_GI < width, other=0.0).to(tl.float32)[None, :, :]


@triton.jit
def _one_row_kernel(
    x, w, scales, minima, bias, residual, out, num_outputs, width, num_groups, w_stride, scale_stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, HAS_MIN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    out_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.minimum(out_N, num_outputs - 1)
    line_N = w + col.to(tl.int64) * w_stride
    if BITS == 16:
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first in range(0, index(width), BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            w_NK = tl.load(line_N[:, None] + k[None, :], mask=(k < width)[None, :], other=0.0).to(tl.float32)
            acc += w_NK * tl.load(x + k, mask=k < width, other=0.0).to(tl.float32)[None, :]
        y = tl.sum(acc, axis=1)
    else:
        BYTES: tl.constexpr = BLOCK_K * BITS // 8
        GROUPS: tl.constexpr = BYTES // GROUP
        value = tl.arange(0, GROUP)[None, :]
        sums = tl.zeros((BLOCK_N, GROUPS, GROUP), tl.float32)
        for first in range(0, index(num_groups), BLOCK_K // GROUP):
            part = tl.arange(0, GROUPS)
            byte = first * GROUP * BITS // 8 + part[:, None] * GROUP + value
            q = tl.load(line_N[:, None, None] + byte[None, :, :], mask=(byte < num_groups * GROUP * BITS // 8)[None, :, :], other=0)
            if BITS == 8:
                group = first + part
                sums += _weighed(q, group, group[:, None] * GROUP + value, x, scales, minima, col, num_groups, width, scale_stride, OFFSET, HAS_MIN)
            else:  # 64 bytes hold 128 values: two groups in their low halves, the two behind them above
                group = first + part // 2 * 4 + part % 2
                k = group[:, None] * GROUP + value
                sums += _weighed(q & 15, group, k, x, scales, minima, col, num_groups, width, scale_stride, OFFSET, HAS_MIN)
                sums += _weighed(q >> 4, group + 2, k + 2 * GROUP, x, scales, minima, col, num_groups, width, scale_stride, OFFSET, HAS_MIN)
        y = tl.sum(tl.sum(sums, axis=2), axis=1)
    live = out_N < num_outputs
    if HAS_BIAS:
        y += tl.load(bias + out_N, mask=live, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + out_N, mask=live, other=0.0).to(tl.float32)
    tl.store(out + out_N, narrow(y, out.dtype.element_ty), mask=live)


def product_of_one_row(x: Array, weight: DeviceWeight, bias: Array | None, residual: Array | None, out: Array) -> None:
    """out (1, N) = x (1, K) W^T + bias + residual."""
    num_outputs, width = weight.shape
    scales = weight.data if weight.scales is None else weight.scales
    num_groups = 0 if weight.scales is None else scales.shape[0]
    block_n, block_k = _TILES[weight.bits]
    launch(
        _one_row_kernel, (cdiv(num_outputs, block_n),), x, weight.data, scales, scales if weight.minima is None else weight.minima,
        x if bias is None else bias, out if residual is None else residual, out, num_outputs, width, num_groups, weight.data.stride(0), scales.stride(0),
        BITS=weight.bits, GROUP=weight.group, OFFSET=weight.offset, HAS_MIN=weight.minima is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, BLOCK_N=block_n, BLOCK_K=min(block_k, max(128, next_power_of_2(width))), num_warps=4,
    )  # fmt: skip
