"""References of the ops on the paged cache. The cache is a numpy `KvPlane`; queries may be numpy or torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from pagoda.kernels.kv import DTYPES, LANES, KvPlane, read_tokens, to_int8
from pagoda.kernels.table import implements

__all__ = ["attention", "kv_write"]

Array = Any


@implements("kv_write", device="reference")
def kv_write(k_TD: Array, v_TD: Array, cache: KvPlane, slots_T: Array) -> None:
    slots = np.asarray(slots_T)
    kept = slots >= 0
    block, offset = np.divmod(slots[kept], cache.block_size)
    if cache.dtype == "int8":
        return _write_int8(np.asarray(k_TD)[kept], np.asarray(v_TD)[kept], cache, block, offset)
    kind = DTYPES[cache.dtype]
    heads = (-1, cache.num_kv_heads, cache.head_dim)
    k = np.asarray(k_TD)[kept].reshape(heads).astype(kind)
    v = np.asarray(v_TD)[kept].reshape(heads).astype(kind)
    group, lane = np.divmod(offset, LANES)
    if cache.dtype == "bfloat16":
        cache.v[block, :, offset // 2, :, offset % 2] = v
        cache.k[block, :, group, :, lane, :] = k.reshape(*k.shape[:2], -1, 2)
    else:
        cache.v[block, :, offset, :] = v
        cache.k[block, :, group, :, lane] = k


def _write_int8(k_TD: np.ndarray, v_TD: np.ndarray, cache: KvPlane, block_T: np.ndarray, offset_T: np.ndarray) -> None:
    heads, dim = cache.num_kv_heads, cache.head_dim
    group_T, lane_T = np.divmod(offset_T, LANES)
    lane_T1, d = lane_T[:, None], np.arange(dim)
    keys_TD = 64 * (d // 4) + 4 * lane_T1 + d % 4
    values_TD = lane_T1 // 4 * 4 * dim + 4 * d + lane_T1 % 4
    scales_T4 = LANES * dim + 4 * lane_T1 + np.arange(4)
    place = block_T[:, None, None], np.arange(heads)[None, :, None], group_T[:, None, None]
    for plane, x_TD, bytes_TD, added in ((cache.k, k_TD, keys_TD, 128), (cache.v, v_TD, values_TD, 0)):
        signed, scale = to_int8(x_TD.reshape(-1, dim))
        plane[*place, bytes_TD[:, None, :]] = (signed.astype(np.int16) + added).astype(np.uint8).reshape(-1, heads, dim)
        plane[*place, scales_T4[:, None, :]] = scale.view(np.uint8).reshape(-1, heads, 4)


@implements("attention", device="reference")
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
    xp = array_namespace(q_TD)
    o_TD = xp.zeros_like(q_TD) if out is None else out
    table = np.asarray(block_table_SB)
    for s, seq_len in enumerate(int(n) for n in seq_lens_S):
        first, stop = int(query_start_S1[s]), int(query_start_S1[s + 1])
        if first == stop:
            continue
        k, v = (xp.asarray(x) for x in read_tokens(cache, table[s], seq_len))  # (keys, kv heads, dim)
        q = xp.reshape(q_TD[first:stop, :], (stop - first, cache.num_kv_heads, -1, head_dim))
        position = xp.arange(seq_len - (stop - first), seq_len)[:, None]
        key = xp.arange(seq_len)[None, :]
        seen = key <= position
        if window > 0:
            seen = seen & (key > position - window)
        y = _attend(q, k, v, seen, scale=scale, soft_cap=soft_cap, sinks_H=sinks_H)
        o_TD[first:stop, :] = xp.reshape(y, (stop - first, -1))
    return o_TD


def _attend(
    q_QHGD: Array, k_JHD: Array, v_JHD: Array, seen_QJ: Array, *, scale: float, soft_cap: float, sinks_H: Array | None
) -> Array:
    """softmax(scale * q.k, over the seen keys) v for each head; G query heads share a key head H. -> (Q, H, G, D)."""
    xp = array_namespace(q_QHGD)
    q_HGQD = xp.permute_dims(q_QHGD, (1, 2, 0, 3))
    k_H1DJ = xp.permute_dims(k_JHD, (1, 2, 0))[:, None, :, :]
    v_H1JD = xp.permute_dims(v_JHD, (1, 0, 2))[:, None, :, :]
    scores = (q_HGQD @ k_H1DJ) * scale
    if soft_cap > 0:
        scores = soft_cap * xp.tanh(scores / soft_cap)
    # A key that is not seen may hold anything, NaN included: it is masked out of both products.
    scores = xp.where(seen_QJ, scores, xp.full_like(scores, -math.inf))
    top = xp.max(scores, axis=-1, keepdims=True)
    p = xp.exp(scores - top)
    total = xp.sum(p, axis=-1, keepdims=True)
    if sinks_H is not None:
        total = total + xp.exp(xp.reshape(sinks_H, (*q_HGQD.shape[:2], 1, 1)) - top)
    p = p / total
    return xp.permute_dims(p @ v_H1JD, (2, 0, 1, 3))
