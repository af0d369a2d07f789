"""Attention over the paged cache, for prefill and decode in one form: ragged queries, a block table per sequence.

A program has a tile of BLOCK_M rows for one key head: QUERIES consecutive queries of one sequence times the GROUP query
heads that read that key head, so a page is read once for all of them. Rows beyond QUERIES * GROUP are padding.

    row r of tile      query r // GROUP of the tile, head r % GROUP of the group
    tile b of a batch  belongs to sequence s where start(s) <= b < start(s + 1), start(s) = query_start[s] // QUERIES + s

start() needs only what the device knows; there are at most T // QUERIES + S tiles, so grids follow from shapes alone, and
programs that find no query return. Keys are read in tiles at absolute positions.

When every sequence brings at most one query (T = S: decoding), contexts are cut into splits of `plane.split_tokens`
tokens, or of four times as many where sequences alone keep a GPU busy, one program each; each leaves its maximum, sum and weighted values
in scratch memory, and a second kernel merges a query's splits in order. Prefill runs through the whole context in one program; with `plane.fixed_tiles` it computes split
after split with decoding's tile and merges alike, so that a token's result does not depend on how it was batched.

    scratch   float32 (T, heads, splits, head_dim + 2): values not yet divided, then maximum and sum, in powers of two
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.fp8 import from_e4m3
from pagoda.kernels.triton.launch import (
    INTERPRET,
    LOG2E,
    Arch,
    arch_of,
    cdiv,
    check_rows,
    dot,
    index,
    launch,
    narrow,
    next_power_of_2,
    tanh,
)
from pagoda.kernels.triton.plane import DevicePlane
from pagoda.kernels.triton.sdpa import sdpa_attention

__all__ = ["attention", "num_splits", "scratch_nbytes", "split_of"]

Array = Any
_MANY_PROGRAMS, _MANY_TOGETHER = 512, 4


@triton.jit
def _sequence_of(number, query_start, num_seqs, PER: tl.constexpr, EXTRA: tl.constexpr):
    """The last s with query_start[s] // PER + EXTRA * s <= number, by bisection."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // PER + EXTRA * middle <= number:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _merge(m, z, acc, m_other, z_other, acc_other):
    """Two partial softmaxes into one. A part that has seen nothing has maximum -inf and sum 0."""
    top = tl.maximum(m, m_other)
    base = tl.where(top == -float("inf"), 0.0, top)
    mine = tl.exp2(m - base)
    other = tl.exp2(m_other - base)
    return top, z * mine + z_other * other, acc * mine[:, None] + acc_other * other[:, None]


@triton.jit
def _attend(
    q_MD, first, stop, position_M, k_head, v_head, table, page_stride, k_factor, soft_cap, window,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, FP8: tl.constexpr, IS_NATIVE: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys [first, stop) that each row may see, from nothing -> maximum, sum, weighted values."""
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DIM_PAD), tl.float32)
    d = tl.arange(0, DIM_PAD)[None, :]
    for tile in range(index(first // BLOCK_N * BLOCK_N), index(stop), BLOCK_N):
        key = tile + tl.arange(0, BLOCK_N)
        there = (key >= first) & (key < stop)
        page = tl.load(table + key // PAGE, mask=there, other=0).to(tl.int64)
        at = (page * page_stride + (key % PAGE) * DIM)[:, None] + d
        # What is not seen may hold anything, NaN included: it is not read.
        live = there[:, None] & (d < DIM)
        if FP8:
            k = from_e4m3(tl.load(k_head + at, mask=live, other=0), IS_NATIVE)
            v = from_e4m3(tl.load(v_head + at, mask=live, other=0), IS_NATIVE)
        else:
            k = tl.load(k_head + at, mask=live, other=0.0).to(q_MD.dtype)
            v = tl.load(v_head + at, mask=live, other=0.0).to(q_MD.dtype)
        s = dot(q_MD, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * k_factor
        if HAS_CAP:
            s = soft_cap * tanh(s / soft_cap)
        seen = there[None, :] & (key[None, :] <= position_M[:, None])
        if HAS_WINDOW:
            seen = seen & (key[None, :] > position_M[:, None] - window)
        s = tl.where(seen, s * LOG2E, -float("inf"))
        top = tl.maximum(m, tl.max(s, axis=1))
        base = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(s - base[:, None])
        old = tl.exp2(m - base)
        z = z * old + tl.sum(p, axis=1)
        acc = dot(narrow(p, q_MD.dtype), v, acc * old[:, None])
        m = top
    return m, z, acc


@triton.jit(do_not_specialize=["num_seqs"])
def _attention_kernel(
    q, k_pages, v_pages, out, scratch, block_table, query_start, seq_lens, sinks,
    q_stride, out_stride, table_stride, num_seqs, scale, k_scale, v_scale, soft_cap, window,
    GROUP: tl.constexpr,  # query heads of a key head
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # keys of a tile; divides SPLIT
    SPLIT: tl.constexpr,
    NUM_SPLITS: tl.constexpr,  # > 1: this program does one split, and leaves it in scratch
    MERGED: tl.constexpr,  # do split after split and merge them, as the second kernel does; sinks are merged in
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FP8: tl.constexpr,
    IS_NATIVE: tl.constexpr,  # the GPU converts fp8
):  # fmt: skip
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    s = _sequence_of(tl.program_id(0), query_start, num_seqs, QUERIES, 1)
    q_first = tl.load(query_start + s)
    q_count = tl.load(query_start + s + 1) - q_first
    q_in_seq = (tl.program_id(0) - (q_first // QUERIES + s)) * QUERIES
    if q_in_seq >= q_count:
        return
    context = tl.load(seq_lens + s) - q_count  # position of the sequence's first query
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(context + q_in_seq - window + 1, 0)
    stop = context + tl.minimum(q_in_seq + QUERIES, q_count)
    if NUM_SPLITS > 1:
        first = tl.maximum(first, tl.program_id(2) * SPLIT)
        stop = tl.minimum(stop, (tl.program_id(2) + 1) * SPLIT)
        if first >= stop:
            return

    num_kv_heads = tl.num_programs(1)
    kv_head = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    query = q_in_seq + row // GROUP
    head = kv_head * GROUP + row % GROUP
    real = (row < QUERIES * GROUP) & (query < q_count)
    token = (q_first + query).to(tl.int64)
    d = tl.arange(0, DIM_PAD)[None, :]
    live = real[:, None] & (d < DIM)
    q_MD = tl.load(q + token[:, None] * q_stride + head[:, None] * DIM + d, mask=live, other=0.0)
    if FP8:  # float16 holds these keys and values exactly; no query is as large as its limit
        q_MD = narrow(tl.clamp(q_MD.to(tl.float32), -65504.0, 65504.0), tl.float16)
    position = context + query
    table = block_table + s.to(tl.int64) * table_stride
    k_head = k_pages + kv_head.to(tl.int64) * PAGE * DIM
    v_head = v_pages + kv_head.to(tl.int64) * PAGE * DIM
    page_stride = num_kv_heads.to(tl.int64) * PAGE * DIM

    if MERGED:
        m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        z = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, DIM_PAD), tl.float32)
        if HAS_SINKS:
            m = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            z = z + 1.0
        for begin in range(index(first // SPLIT * SPLIT), index(stop), SPLIT):
            m_part, z_part, acc_part = _attend(
                q_MD, tl.maximum(begin, first), tl.minimum(begin + SPLIT, stop), position, k_head, v_head, table, page_stride,
                scale * k_scale, soft_cap, window, DIM, DIM_PAD, PAGE, BLOCK_M, BLOCK_N, HAS_WINDOW, HAS_CAP, FP8, IS_NATIVE,
            )  # fmt: skip
            m, z, acc = _merge(m, z, acc, m_part, z_part, acc_part)
    else:
        m, z, acc = _attend(
            q_MD, first, stop, position, k_head, v_head, table, page_stride,
            scale * k_scale, soft_cap, window, DIM, DIM_PAD, PAGE, BLOCK_M, BLOCK_N, HAS_WINDOW, HAS_CAP, FP8, IS_NATIVE,
        )  # fmt: skip
    if NUM_SPLITS > 1:
        place = (token * (num_kv_heads * GROUP) + head) * NUM_SPLITS + tl.program_id(2)
        tl.store(scratch + place[:, None] * (DIM + 2) + d, acc, mask=live)
        tl.store(scratch + place * (DIM + 2) + DIM, m, mask=real)
        tl.store(scratch + place * (DIM + 2) + DIM + 1, z, mask=real)
    else:
        y = acc / z[:, None] * v_scale
        tl.store(out + token[:, None] * out_stride + head[:, None] * DIM + d, narrow(y, out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_seqs"])
def _merge_kernel(
    scratch, out, query_start, seq_lens, sinks, out_stride, num_seqs, v_scale, window,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, SPLIT: tl.constexpr, NUM_SPLITS: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
    HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    num_heads = tl.num_programs(1) * HEADS
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    if token >= tl.load(query_start + num_seqs):
        return
    s = _sequence_of(token, query_start, num_seqs, 1, 0)
    position = tl.load(seq_lens + s) - tl.load(query_start + s + 1) + token
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(position - window + 1, 0)
    d = tl.arange(0, DIM_PAD)[None, :]
    m = tl.full((HEADS,), -float("inf"), tl.float32)
    z = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, DIM_PAD), tl.float32)
    if HAS_SINKS:
        m = tl.load(sinks + head).to(tl.float32) * LOG2E
        z = z + 1.0
    line = scratch + ((token.to(tl.int64) * num_heads + head) * NUM_SPLITS * (DIM + 2))
    for split in range(index(first // SPLIT), index(position // SPLIT + 1)):
        part = line + split * (DIM + 2)
        acc_part = tl.load(part[:, None] + d, mask=d < DIM, other=0.0)
        m, z, acc = _merge(m, z, acc, tl.load(part + DIM), tl.load(part + DIM + 1), acc_part)
    y = acc / z[:, None] * v_scale
    target = out + token.to(tl.int64) * out_stride + head[:, None] * DIM + d
    tl.store(target, narrow(y, out.dtype.element_ty), mask=d < DIM)


class _Tiles(NamedTuple):
    """How a launch is cut up; a function of shapes, never of lengths."""

    block_m: int
    block_n: int
    num_splits: int
    is_merged: bool
    num_warps: int
    num_stages: int


def split_of(num_seqs: int, cache: DevicePlane) -> int:
    """Tokens of a context that one program of a decoding step reads: more where there are many sequences, whose merging would cost a seventh."""
    is_many = num_seqs * cache.num_kv_heads >= _MANY_PROGRAMS and not cache.fixed_tiles
    return cache.split_tokens * (_MANY_TOGETHER if is_many else 1)


def num_splits(table_width: int, split_tokens: int, cache: DevicePlane) -> int:
    """Splits of the longest context that a block table can hold."""
    return cdiv(table_width * cache.block_size, split_tokens)


def scratch_nbytes(max_seqs: int, num_heads: int, table_width: int, cache: DevicePlane) -> int:
    """Bytes of scratch memory that a decoding step of up to `max_seqs` sequences takes; 0 when one split holds all."""
    most_alone = min(max_seqs, (_MANY_PROGRAMS - 1) // cache.num_kv_heads)  # of whom each is cut up finely
    found = 0
    for seqs in (max_seqs, most_alone):
        splits = num_splits(table_width, split_of(seqs, cache), cache)
        found = max(found, 0 if splits == 1 else 4 * seqs * num_heads * splits * (cache.head_dim + 2))
    return found


def _tiles(arch: Arch, num_tokens: int, num_seqs: int, group: int, splits: int, cache: DevicePlane, *, has_sinks: bool) -> _Tiles:
    """Tiles that compile without spilling registers, with Triton 3.6 and with 3.9 (`tests/kernels_triton/aot.py` compiles them for each
    architecture)."""
    is_decode, is_wide, is_hip = num_tokens <= num_seqs, cache.head_dim > 128, arch.backend == "hip"
    is_old = not is_hip and arch.number < 90
    block_m = max(16, next_power_of_2(group))
    if (is_decode or cache.fixed_tiles) and block_m < 64:
        block_n = (16 if is_old else 32) if is_wide or (is_hip and has_sinks) else 64
        stages = 2 if is_hip or is_old or is_wide or cache.dtype == "fp8_e4m3" else 3
        return _Tiles(block_m, block_n, splits if is_decode else 1, not is_decode and splits > 1, 8 if is_wide and is_old else 4, stages)
    block_n = 64 if not (is_hip or is_old) else 16 if is_wide or (is_hip and has_sinks) else 32
    if not is_hip and arch.number >= 100 and cache.head_dim <= 64:
        block_n = 32
    is_merged = cache.fixed_tiles and not is_decode and splits > 1
    tile = block_m if is_decode or cache.fixed_tiles else max(block_m, 64 if is_wide else 128)
    return _Tiles(tile, block_n, splits if is_decode else 1, is_merged, 8, 2)


@implements("attention", device="cuda")
def attention(
    q_TD: Array,
    cache: DevicePlane,
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
    if head_dim != cache.head_dim:
        raise ValueError(f"op `attention`: head_dim is {head_dim}, the cache's is {cache.head_dim}")
    out = torch.empty(q_TD.shape, dtype=q_TD.dtype, device=q_TD.device) if out is None else out
    check_rows("attention", q=q_TD, out=out)
    if cache.backend == "sdpa":
        if sinks_H is not None or soft_cap > 0:
            raise ValueError("op `attention`: backend sdpa has neither sinks nor soft caps")
        return sdpa_attention(q_TD, cache, block_table_SB, query_start_S1, seq_lens_S, scale=scale, window=window, out=out)
    tokens, seqs, heads = q_TD.shape[0], seq_lens_S.shape[0], q_TD.shape[1] // head_dim
    group = heads // cache.num_kv_heads
    arch, split = arch_of(q_TD), split_of(seqs, cache)
    tiles = _tiles(arch, tokens, seqs, group, num_splits(block_table_SB.shape[1], split, cache), cache, has_sinks=sinks_H is not None)
    scratch = out
    if tiles.num_splits > 1:
        scratch = torch.empty((tokens, heads, tiles.num_splits, head_dim + 2), dtype=torch.float32, device=q_TD.device)
    sinks = seq_lens_S if sinks_H is None else sinks_H
    padded = next_power_of_2(head_dim)
    flags = {"HAS_WINDOW": window > 0, "HAS_SINKS": sinks_H is not None}
    launch(
        _attention_kernel, (tokens // (tiles.block_m // group) + seqs, cache.num_kv_heads, tiles.num_splits),
        q_TD, cache.k, cache.v, out, scratch, block_table_SB, query_start_S1, seq_lens_S, sinks,
        q_TD.stride(0), out.stride(0), block_table_SB.stride(0), seqs, float(scale), cache.k_scale, cache.v_scale,
        float(soft_cap), window, GROUP=group, DIM=head_dim, DIM_PAD=max(16, padded), PAGE=cache.block_size, BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n, SPLIT=split, NUM_SPLITS=tiles.num_splits, MERGED=tiles.is_merged or (sinks_H is not None and tiles.num_splits == 1), HAS_CAP=soft_cap > 0,
        FP8=cache.dtype == "fp8_e4m3", IS_NATIVE=arch.backend == "cuda" and arch.number >= 89 and not INTERPRET, num_warps=tiles.num_warps, num_stages=tiles.num_stages, **flags,
    )  # fmt: skip
    if tiles.num_splits > 1:
        per_program = heads & -heads  # the largest power of two that divides it
        per_program = min(per_program, 4)
        launch(
            _merge_kernel, (tokens, heads // per_program), scratch, out, query_start_S1, seq_lens_S, sinks, out.stride(0), seqs,
            cache.v_scale, window, DIM=head_dim, DIM_PAD=max(16, padded), SPLIT=split, NUM_SPLITS=tiles.num_splits,
            HEADS=per_program, num_warps=4, num_stages=2, **flags,
        )  # fmt: skip
    return out
