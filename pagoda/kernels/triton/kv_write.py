"""Stores this step's keys and values in their pages: a program per token, all heads of it at once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.fp8 import to_e4m3
from pagoda.kernels.triton.launch import cdiv, check_rows, launch, narrow, next_power_of_2
from pagoda.kernels.triton.plane import DevicePlane

__all__ = ["kv_write"]

Array = Any
_TILE = 1024


@triton.jit
def _kv_write_kernel(
    k, v, k_pages, v_pages, slots,
    k_stride, v_stride, k_inverse, v_inverse, width,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    PAGE: tl.constexpr,  # tokens of a page
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        live = col < width
        page, offset = slot // PAGE, slot % PAGE
        target = ((page * HEADS + col // DIM) * PAGE + offset) * DIM + col % DIM
        key = tl.load(k + row * k_stride + col, mask=live, other=0.0).to(tl.float32)
        value = tl.load(v + row * v_stride + col, mask=live, other=0.0).to(tl.float32)
        if FP8:
            tl.store(k_pages + target, to_e4m3(key * k_inverse), mask=live)
            tl.store(v_pages + target, to_e4m3(value * v_inverse), mask=live)
        else:
            tl.store(k_pages + target, narrow(key, k_pages.dtype.element_ty), mask=live)
            tl.store(v_pages + target, narrow(value, v_pages.dtype.element_ty), mask=live)


@implements("kv_write", device="cuda")
def kv_write(k_TD: Array, v_TD: Array, cache: DevicePlane, slots_T: Array) -> None:
    check_rows("kv_write", k=k_TD, v=v_TD, slots=slots_T)
    width = cache.num_kv_heads * cache.head_dim
    block = min(_TILE, next_power_of_2(width))
    launch(
        _kv_write_kernel, (k_TD.shape[0], cdiv(width, block)),
        k_TD, v_TD, cache.k, cache.v, slots_T, k_TD.stride(0), v_TD.stride(0), 1.0 / cache.k_scale, 1.0 / cache.v_scale, width,
        DIM=cache.head_dim, HEADS=cache.num_kv_heads, PAGE=cache.block_size, FP8=cache.dtype == "fp8_e4m3", BLOCK=block,
        num_warps=4,
    )  # fmt: skip
