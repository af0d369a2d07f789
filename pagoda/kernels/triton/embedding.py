"""Rows of a table, dense or quantized; every row in order is the whole matrix dequantized."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.launch import cdiv, launch, narrow, next_power_of_2
from pagoda.kernels.triton.weight import DeviceWeight

__all__ = ["dequantize", "embedding"]

Array = Any
_TILE = 1024


@triton.jit
def _embedding_kernel(
    ids, table, scales, minima, out,
    table_stride, scale_stride, out_stride, width, num_rows, factor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_MIN: tl.constexpr,
    HAS_IDS: tl.constexpr,  # without: row i of the table is row i of the result
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ids + row).to(tl.int64) if HAS_IDS else row
    source = tl.minimum(tl.maximum(source, 0), num_rows - 1)  # padding of a batch may hold any id
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    if BITS == 16:
        value = tl.load(table + source * table_stride + col, mask=live, other=0.0).to(tl.float32)
    else:
        if BITS == 8:
            q = tl.load(table + source * table_stride + col, mask=live, other=0).to(tl.int32)
        else:
            byte = tl.load(table + source * table_stride + (col // 128) * 64 + col % 64, mask=live, other=0).to(tl.int32)
            q = (byte >> ((col // 64) % 2 * 4)) & 15
        at = (col // GROUP).to(tl.int64) * scale_stride + source
        value = (q - OFFSET).to(tl.float32) * tl.load(scales + at, mask=live, other=0.0).to(tl.float32)
        if HAS_MIN:
            value += tl.load(minima + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, narrow(value * factor, out.dtype.element_ty), mask=live)


def _rows(ids_T: Array | None, table: DeviceWeight, rows: int, factor: float) -> Array:
    width = table.shape[1]
    out = torch.empty((rows, width), dtype=table.dtype, device=table.data.device)
    scales = table.data if table.scales is None else table.scales
    block = min(_TILE, next_power_of_2(width))
    launch(
        _embedding_kernel, (rows, cdiv(width, block)),
        table.data if ids_T is None else ids_T, table.data, scales, scales if table.minima is None else table.minima, out,
        table.data.stride(0), scales.stride(0), out.stride(0), width, table.shape[0], float(factor),
        BITS=table.bits, GROUP=table.group, OFFSET=table.offset, HAS_MIN=table.minima is not None,
        HAS_IDS=ids_T is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@implements("embedding", device="cuda")
def embedding(ids_T: Array, table: DeviceWeight, *, scale: float = 1.0) -> Array:
    return _rows(ids_T, table, ids_T.shape[0], scale)


def dequantize(weight: DeviceWeight) -> Array:
    """The matrix a weight stands for, (N, K) of its `dtype`: what products of many rows multiply with."""
    return _rows(None, weight, weight.shape[0], 1.0)
