"""Steps on logits for all rows of a batch at once: masks, biases, penalties, log-probabilities. Each reads device memory only.

The most likely tokens come in one order, logits descending and ids ascending: torch's top-k of integers that are in that order, because its
own leaves open which of equal numbers it takes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.launch import cdiv, check_rows, index, launch, narrow, next_power_of_2
from pagoda.kernels.triton.sample import key_of

__all__ = ["add_at", "apply_bitmask", "copy_rows", "count_tokens", "penalize", "pick_logprobs", "put_ids", "top_tokens"]

Array = Any
_BLOCK = 1024
_TOP_ROWS = 32  # whose keys, 8 bytes a logit, are held at a time


@triton.jit
def _copy_rows_kernel(source, target, rows, places, source_stride, target_stride, width, HAS_PLACES: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number).to(tl.int64)
    place = number
    if HAS_PLACES:
        place = tl.load(places + number).to(tl.int64)
    if (row >= 0) & (place >= 0):
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(source + row * source_stride + col, mask=col < width, other=0.0).to(tl.float32)
        tl.store(target + place * target_stride + col, narrow(x, target.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=["count"])
def _add_kernel(logits, rows, ids, values, stride, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < count, other=-1).to(tl.int64)
    place = logits + row * stride + tl.load(ids + at, mask=at < count, other=0).to(tl.int64)
    tl.atomic_add(place, tl.load(values + at, mask=at < count, other=0.0), mask=row >= 0)


@triton.jit(do_not_specialize=["count"])
def _put_kernel(ids, rows, found, good, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + at, mask=at < count, other=-1).to(tl.int64)
    is_good = tl.load(good + at, mask=at < count, other=0) != 0
    token = tl.load(found + at, mask=at < count, other=-1)
    tl.store(ids + row, tl.where(is_good, token, -1), mask=row >= 0)


@triton.jit
def _keys_kernel(logits, out, stride, out_stride, width, BLOCK: tl.constexpr):
    """An integer in the order of logits, then of ids from the end."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, (key_of(x) << 32) | (0x7FFFFFFF - col).to(tl.int64), mask=col < width)


@triton.jit
def _bitmask_kernel(logits, words, rows, stride, words_stride, width, BLOCK: tl.constexpr):
    mask = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + mask).to(tl.int64)
    if row >= 0:
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        word = tl.load(words + mask * words_stride + col // 32, mask=col < width, other=-1).to(tl.int32)
        is_forbidden = ((word >> (col % 32)) & 1) == 0
        nothing = tl.full((BLOCK,), -float("inf"), tl.float32).to(logits.dtype.element_ty)
        tl.store(logits + row * stride + col, nothing, mask=is_forbidden & (col < width))


@triton.jit
def _count_kernel(seen, tokens, slots, begins, ends, prompts, seen_stride, tokens_stride, BLOCK: tl.constexpr):
    number = tl.program_id(0)
    slot = tl.load(slots + number).to(tl.int64)
    if slot >= 0:
        position = tl.load(begins + number) + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        live = position < tl.load(ends + number)
        is_prompt = position < tl.load(prompts + number)
        token = tl.load(tokens + slot * tokens_stride + position, mask=live, other=0).to(tl.int64)
        place = seen + slot * seen_stride + token
        tl.atomic_or(place, tl.full((BLOCK,), 1, tl.int32), mask=live & is_prompt)
        tl.atomic_add(place, tl.full((BLOCK,), 2, tl.int32), mask=live & ~is_prompt)


@triton.jit
def _penalize_kernel(
    logits, seen, slots, repetitions, frequencies, presences, stride, seen_stride, width, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        live = col < width
        noted = tl.load(seen + slot * seen_stride + col, mask=live, other=0)
        if tl.max(noted, axis=0) > 0:
            repetition = tl.load(repetitions + row)
            x = tl.load(logits + row * stride + col, mask=live, other=0.0)
            y = tl.where(noted > 0, tl.where(x > 0, tl.div_rn(x, x * 0 + repetition), x * repetition), x)
            count = (noted >> 1).to(tl.float32)
            y = tl.where(count > 0, y - (tl.load(frequencies + row) * count + tl.load(presences + row)), y)
            tl.store(logits + row * stride + col, y, mask=live)


@triton.jit
def _pick_kernel(
    logits, rows, normalizers, ids, out, ranks, stride, ids_stride, out_stride, width, count, COUNT_PAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + tl.load(rows + row).to(tl.int64) * stride
    k = tl.arange(0, COUNT_PAD)
    chosen = tl.load(ids + row * ids_stride + k, mask=k < count, other=-1).to(tl.int64)
    x = tl.load(line + tl.maximum(chosen, 0)).to(tl.float32)
    y = tl.where(chosen >= 0, x - tl.load(normalizers + row), -float("inf"))
    tl.store(out + row * out_stride + k, y, mask=k < count)
    first = tl.load(line + tl.maximum(tl.load(ids + row * ids_stride).to(tl.int64), 0)).to(tl.float32)
    larger = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, index(width), BLOCK):
        col = start + tl.arange(0, BLOCK)
        larger += (tl.load(line + col, mask=col < width, other=-float("inf")).to(tl.float32) > first).to(tl.int32)
    tl.store(ranks + row, 1 + tl.sum(larger, axis=0))


@implements("apply_bitmask", device="cuda")
def apply_bitmask(logits_RV: Array, words_MW: Array, row_M: Array) -> None:
    check_rows("apply_bitmask", words=words_MW, row=row_M)
    width = logits_RV.shape[1]
    launch(
        _bitmask_kernel, (words_MW.shape[0], cdiv(width, _BLOCK)), logits_RV, words_MW, row_M,
        logits_RV.stride(0), words_MW.stride(0), width, BLOCK=_BLOCK,
    )  # fmt: skip


@implements("copy_rows", device="cuda")
def copy_rows(source_RV: Array, row_M: Array, out_NV: Array, place_M: Array | None = None) -> None:
    check_rows("copy_rows", row=row_M, place=place_M)
    width = source_RV.shape[1]
    launch(
        _copy_rows_kernel, (row_M.shape[0], cdiv(width, _BLOCK)), source_RV, out_NV, row_M, row_M if place_M is None else place_M,
        source_RV.stride(0), out_NV.stride(0), width, HAS_PLACES=place_M is not None, BLOCK=_BLOCK,
    )  # fmt: skip


@implements("add_at", device="cuda")
def add_at(logits_RV: Array, row_E: Array, id_E: Array, value_E: Array) -> None:
    check_rows("add_at", row=row_E, id=id_E, value=value_E)
    count = row_E.shape[0]
    launch(_add_kernel, (cdiv(count, _BLOCK),), logits_RV, row_E, id_E, value_E, logits_RV.stride(0), count, BLOCK=_BLOCK)


@implements("put_ids", device="cuda")
def put_ids(ids_R: Array, row_M: Array, id_M: Array, is_good_M: Array) -> None:
    check_rows("put_ids", row=row_M, id=id_M, is_good=is_good_M)
    count = row_M.shape[0]
    launch(_put_kernel, (cdiv(count, _BLOCK),), ids_R, row_M, id_M, is_good_M.view(torch.int8), count, BLOCK=_BLOCK)


@implements("top_tokens", device="cuda")
def top_tokens(logits_MV: Array, count: int) -> Array:
    rows, width = logits_MV.shape
    out = torch.empty((rows, count), dtype=torch.int32, device=logits_MV.device)
    for first in range(0, rows, _TOP_ROWS):
        part = logits_MV[first : first + _TOP_ROWS]
        keys = torch.empty(part.shape, dtype=torch.int64, device=part.device)
        launch(_keys_kernel, (part.shape[0], cdiv(width, _BLOCK)), part, keys, part.stride(0), keys.stride(0), width, BLOCK=_BLOCK)
        top = torch.topk(keys, count, dim=1).values
        out[first : first + _TOP_ROWS] = 0x7FFFFFFF - (top & 0xFFFFFFFF)
    return out


@implements("count_tokens", device="cuda")
def count_tokens(
    seen_NV: Array, tokens_NL: Array, slot_M: Array, begin_M: Array, end_M: Array, num_prompt_M: Array, *, longest: int
) -> None:
    check_rows("count_tokens", slot=slot_M, begin=begin_M, end=end_M, num_prompt=num_prompt_M)
    block = 32 if longest <= 32 else _BLOCK
    launch(
        _count_kernel, (slot_M.shape[0], cdiv(longest, block)), seen_NV, tokens_NL, slot_M, begin_M, end_M, num_prompt_M,
        seen_NV.stride(0), tokens_NL.stride(0), BLOCK=block,
    )  # fmt: skip


@implements("penalize", device="cuda")
def penalize(
    logits_RV: Array, seen_NV: Array, slot_R: Array, repetition_R: Array, frequency_R: Array, presence_R: Array
) -> None:
    check_rows("penalize", logits=logits_RV, slot=slot_R, repetition=repetition_R, frequency=frequency_R, presence=presence_R)
    rows, width = logits_RV.shape
    launch(
        _penalize_kernel, (rows, cdiv(width, _BLOCK)), logits_RV, seen_NV, slot_R, repetition_R, frequency_R, presence_R,
        logits_RV.stride(0), seen_NV.stride(0), width, BLOCK=_BLOCK,
    )  # fmt: skip


@implements("pick_logprobs", device="cuda")
def pick_logprobs(logits_RV: Array, row_M: Array, logsumexp_M: Array, ids_MK: Array) -> tuple[Array, Array]:
    check_rows("pick_logprobs", row=row_M, logsumexp=logsumexp_M, ids=ids_MK)
    rows, count = ids_MK.shape
    out = torch.empty((rows, count), dtype=torch.float32, device=logits_RV.device)
    ranks = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    launch(
        _pick_kernel, (rows,), logits_RV, row_M, logsumexp_M, ids_MK, out, ranks, logits_RV.stride(0), ids_MK.stride(0),
        out.stride(0), logits_RV.shape[1], count, COUNT_PAD=next_power_of_2(count), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return out, ranks
