"""The ops on the native library. The same function runs an op now or appends it to a program.

With numpy operands the op runs at once; with `SymArray`s it is recorded. Both hand the same instruction to the same
kernel, so a program's results equal op-by-op results bit for bit. Formulas and shapes are in `pagoda.kernels.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pagoda.kernels.cpu import library
from pagoda.kernels.kv import KvPlane
from pagoda.kernels.symbolic import SymArray
from pagoda.kernels.table import implements
from pagoda.kernels.weight import Weight

__all__ = ["ACTIVATIONS"]

Array = Any
NATIVE = ("cpu", "record")
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}

# Operands that must have the same number of rows, by op.
_SAME_ROWS: dict[str, tuple[int, ...]] = {
    "embedding": (0, 2),
    "rms_norm": (0, 2),
    "linear": (0, 3, 4),
    "rope": (0, 1, 3),
    "kv_write": (0, 1, 4),
    "attention": (0, 6),
    "act_and_mul": (0, 1),
    "add": (0, 1, 2),
    "scale": (0, 1),
    "soft_cap": (0, 1),
    "gather_rows": (1, 2),
    "row_logsumexp": (0, 1),
    "row_is_finite": (0, 1),
    "sample": (0, 1, 2, 3, 4, 5, 6, 7),
    "sample_masked": (1, 2, 3, 4, 5, 6, 7, 8, 9),
}


def _emit(op: str, operands: Sequence[Any], ints: Sequence[int] = (), floats: Sequence[float] = ()) -> None:
    rows = {operands[k].shape[0] for k in _SAME_ROWS[op] if operands[k] is not None}
    if len(rows) != 1:
        raise ValueError(f"op `{op}`: operands have different numbers of rows: {sorted(map(str, rows))}")
    recorder = next((x.recorder for x in operands if isinstance(x, SymArray)), None)
    if recorder is not None:
        recorder.emit(op, operands, ints, floats)
        return
    lib = library.default()
    lib.run(lib.instruction(op, [library.describe(x) for x in operands], ints, floats))


def _new(like: Array, cols: int | None, dtype: Any = np.float32) -> Array:
    """An uninitialised result with the rows of `like`; cols None: one-dimensional."""
    if isinstance(like, SymArray):
        return like.recorder.temporary(like.shape[0], cols, np.dtype(dtype))
    rows = like.shape[0]
    return np.empty((rows,) if cols is None else (rows, cols), dtype)


@implements("embedding", device=NATIVE)
def embedding(ids_T: Array, table: Weight, *, scale: float = 1.0) -> Array:
    out = _new(ids_T, table.shape[1])
    _emit("embedding", (ids_T, table, out), floats=(scale,))
    return out


@implements("rms_norm", device=NATIVE)
def rms_norm(x_TD: Array, weight_G: Array, *, eps: float, residual: Array | None = None, out: Array | None = None) -> Array:
    if residual is not None:
        x_TD = add(x_TD, residual, out=residual)
    out = _new(x_TD, x_TD.shape[1]) if out is None else out
    _emit("rms_norm", (x_TD, weight_G, out), floats=(eps,))
    return out


@implements("linear", device=NATIVE)
def linear(
    x_TK: Array,
    weight: Weight,
    bias_N: Array | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    out = _new(x_TK, weight.shape[0]) if out is None else out
    _emit("linear", (x_TK, weight, bias_N, residual, out, None))
    return out


@implements("rope", device=NATIVE)
def rope(
    x_TD: Array, positions_T: Array, cos_sin_PR: Array, *, head_dim: int, out: Array | None = None
) -> Array:
    out = _new(x_TD, x_TD.shape[1]) if out is None else out
    _emit("rope", (x_TD, positions_T, cos_sin_PR, out), ints=(head_dim,))
    return out


def _plane_sizes(cache: KvPlane) -> tuple[int, int, int, int]:
    return cache.block_size, cache.num_kv_heads, cache.head_dim, cache.num_blocks


@implements("kv_write", device=NATIVE)
def kv_write(k_TD: Array, v_TD: Array, cache: KvPlane, slots_T: Array) -> None:
    _emit("kv_write", (k_TD, v_TD, cache.k, cache.v, slots_T), ints=_plane_sizes(cache))


@implements("attention", device=NATIVE)
def attention(
    q_TD: Array,
    cache: KvPlane,
    block_table_SB: Array,
    query_start_S1: Array,
    seq_lens_S: Array,
    *,
    scale: float,
    head_dim: int,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks_H: Array | None = None,
    out: Array | None = None,
) -> Array:
    if sinks_H is not None:
        raise ValueError("op `attention`: sinks have no native kernel; PAGODA_KERNELS=reference computes them")
    if head_dim != cache.head_dim:
        raise ValueError(f"op `attention`: head_dim is {head_dim}, the cache's is {cache.head_dim}")
    out = _new(q_TD, q_TD.shape[1]) if out is None else out
    operands = (q_TD, cache.k, cache.v, block_table_SB, query_start_S1, seq_lens_S, out)
    _emit("attention", operands, ints=(*_plane_sizes(cache), window), floats=(scale, soft_cap))
    return out


@implements("act_and_mul", device=NATIVE)
def act_and_mul(x_T2F: Array, kind: str, *, out: Array | None = None) -> Array:
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation `{kind}` is not one of {', '.join(ACTIVATIONS)}")
    out = _new(x_T2F, x_T2F.shape[1] // 2) if out is None else out
    _emit("act_and_mul", (x_T2F, out), ints=(ACTIVATIONS[kind],))
    return out


@implements("add", device=NATIVE)
def add(x_TD: Array, y_TD: Array, *, out: Array | None = None) -> Array:
    out = _new(x_TD, x_TD.shape[1]) if out is None else out
    _emit("add", (x_TD, y_TD, out))
    return out


@implements("scale", device=NATIVE)
def scale(x_TD: Array, factor: float, *, out: Array | None = None) -> Array:
    out = _new(x_TD, x_TD.shape[1]) if out is None else out
    _emit("scale", (x_TD, out), floats=(factor,))
    return out


@implements("soft_cap", device=NATIVE)
def soft_cap(x_TD: Array, cap: float, *, out: Array | None = None) -> Array:
    out = _new(x_TD, x_TD.shape[1]) if out is None else out
    _emit("soft_cap", (x_TD, out), floats=(cap,))
    return out


@implements("gather_rows", device=NATIVE)
def gather_rows(x_TD: Array, idx_R: Array) -> Array:
    out = _new(idx_R, x_TD.shape[1])
    _emit("gather_rows", (x_TD, idx_R, out))
    return out


@implements("empty_like_rows", device=NATIVE)
def empty_like_rows(x_TD: Array, cols: int) -> Array:
    return _new(x_TD, cols)


@implements("row_logsumexp", device=NATIVE)
def row_logsumexp(logits_RV: Array) -> Array:
    out = _new(logits_RV, None)
    _emit("row_logsumexp", (logits_RV, out))
    return out


@implements("row_is_finite", device=NATIVE)
def row_is_finite(logits_RV: Array) -> Array:
    out = _new(logits_RV, None, np.bool_)
    _emit("row_is_finite", (logits_RV, out))
    return out


@implements("sample", device=NATIVE)
def sample(
    logits_RV: Array,
    temperature_R: Array,
    top_k_R: Array,
    top_p_R: Array,
    min_p_R: Array,
    seed_R: Array,
    position_R: Array,
) -> Array:
    out = _new(logits_RV, None, np.int32)
    _emit("sample", (logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R, out))
    return out


@implements("sample_masked", device=NATIVE)
def sample_masked(
    logits_RV: Array,
    row_M: Array,
    mask_MB: Array,
    temperature_M: Array,
    top_k_M: Array,
    top_p_M: Array,
    min_p_M: Array,
    seed_M: Array,
    position_M: Array,
) -> Array:
    out = _new(row_M, None, np.int32)
    _emit("sample_masked", (logits_RV, row_M, mask_MB, temperature_M, top_k_M, top_p_M, min_p_M, seed_M, position_M, out))
    return out
