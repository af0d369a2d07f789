"""Steps on logits for all rows of a batch at once: masks, penalties, log-probabilities. Each reads device memory only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pagoda.kernels.table import implements
from pagoda.kernels.triton.launch import cdiv, check_rows, index, launch, next_power_of_2

__all__ = ["apply_bitmask", "count_tokens", "penalize", "pick_logprobs"]

Array = Any
_BLOCK = 1024


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


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(seen, slots, tokens, stride, num_tokens, IS_PROMPT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + at, mask=at < num_tokens, other=-1).to(tl.int64)
    place = seen + slot * stride + tl.load(tokens + at, mask=at < num_tokens, other=0).to(tl.int64)
    if IS_PROMPT:
        tl.atomic_or(place, tl.full((BLOCK,), 1, tl.int32), mask=slot >= 0)
    else:
        tl.atomic_add(place, tl.full((BLOCK,), 2, tl.int32), mask=slot >= 0)


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
    logits, normalizers, ids, out, ranks, stride, ids_stride, out_stride, width, count, COUNT_PAD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
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


@implements("count_tokens", device="cuda")
def count_tokens(seen_NV: Array, slot_T: Array, token_T: Array, *, is_prompt: bool) -> None:
    check_rows("count_tokens", slot=slot_T, token=token_T)
    rows = slot_T.shape[0]
    block = min(_BLOCK, next_power_of_2(rows))
    launch(
        _count_kernel, (cdiv(rows, block),), seen_NV, slot_T, token_T, seen_NV.stride(0), rows,
        IS_PROMPT=is_prompt, BLOCK=block,
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
def pick_logprobs(logits_RV: Array, logsumexp_R: Array, ids_RK: Array) -> tuple[Array, Array]:
    check_rows("pick_logprobs", logits=logits_RV, logsumexp=logsumexp_R, ids=ids_RK)
    rows, count = ids_RK.shape
    out = torch.empty((rows, count), dtype=torch.float32, device=logits_RV.device)
    ranks = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    launch(
        _pick_kernel, (rows,), logits_RV, logsumexp_R, ids_RK, out, ranks, logits_RV.stride(0), ids_RK.stride(0),
        out.stride(0), logits_RV.shape[1], count, COUNT_PAD=next_power_of_2(count), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return out, ranks
