"""act(gate) * up, in float32, over tiles of one row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.launch import cdiv, check_rows, launch, narrow, next_power_of_2, tanh

__all__ = ["act_and_mul"]

Array = Any
_KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}
_TILE = 1024


@triton.jit
def _act_and_mul_kernel(x, out, x_stride, out_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    gate = tl.load(x + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + width + col, mask=live, other=0.0).to(tl.float32)
    if KIND == 0:
        act = gate / (1 + tl.exp(-gate))
    elif KIND == 1:
        act = 0.5 * gate * (1 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    elif KIND == 2:
        act = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        act = tl.where(gate > 0, gate, 0.0)
    tl.store(out + row * out_stride + col, narrow(act * up, out.dtype.element_ty), mask=live)


@implements("act_and_mul", device="cuda")
def act_and_mul(x_T2F: Array, kind: str, *, out: Array | None = None) -> Array:
    if kind not in _KINDS:
        raise ValueError(f"activation `{kind}` is not one of {', '.join(_KINDS)}")
    rows, width = x_T2F.shape[0], x_T2F.shape[1] // 2
    out = torch.empty((rows, width), dtype=x_T2F.dtype, device=x_T2F.device) if out is None else out
    check_rows("act_and_mul", x=x_T2F, out=out)
    block = min(_TILE, next_power_of_2(width))
    launch(
        _act_and_mul_kernel, (rows, cdiv(width, block)), x_T2F, out, x_T2F.stride(0), out.stride(0), width,
        KIND=_KINDS[kind], BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
