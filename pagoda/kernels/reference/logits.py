"""References of `pagoda.kernels.logits_ops`, on numpy arrays or torch tensors on the CPU, a row at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pagoda.kernels.table import implements

__all__ = ["add_at", "apply_bitmask", "copy_rows", "count_tokens", "penalize", "pick_logprobs", "put_ids", "top_tokens"]

Array = Any


@implements("apply_bitmask", device="reference")
def apply_bitmask(logits_RV: Array, words_MW: Array, row_M: Array) -> None:
    for words, row in zip(np.asarray(words_MW), np.asarray(row_M).tolist(), strict=True):
        if row >= 0:
            bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")
            logits_RV[row][bits[: logits_RV.shape[1]] == 0] = -math.inf


@implements("copy_rows", device="reference")
def copy_rows(source_RV: Array, row_M: Array, out_NV: Array, place_M: Array | None = None) -> None:
    rows = np.asarray(row_M).tolist()
    for row, place in zip(rows, range(len(rows)) if place_M is None else np.asarray(place_M).tolist(), strict=True):
        if row >= 0 and place >= 0:
            out_NV[place] = source_RV[row]


@implements("add_at", device="reference")
def add_at(logits_RV: Array, row_E: Array, id_E: Array, value_E: Array) -> None:
    for row, token, value in zip(np.asarray(row_E).tolist(), np.asarray(id_E).tolist(), np.asarray(value_E), strict=True):
        if row >= 0:
            logits_RV[row, token] += value


@implements("put_ids", device="reference")
def put_ids(ids_R: Array, row_M: Array, id_M: Array, is_good_M: Array) -> None:
    for row, token, is_good in zip(np.asarray(row_M).tolist(), np.asarray(id_M).tolist(), np.asarray(is_good_M).tolist(), strict=True):
        if row >= 0:
            ids_R[row] = token if is_good else -1


@implements("top_tokens", device="reference")
def top_tokens(logits_MV: Array, count: int) -> Array:
    return np.argsort(-np.asarray(logits_MV), axis=1, kind="stable")[:, :count].astype(np.int32)


@implements("count_tokens", device="reference")
def count_tokens(
    seen_NV: Array, tokens_NL: Array, slot_M: Array, begin_M: Array, end_M: Array, num_prompt_M: Array, *, longest: int
) -> None:
    for slot, begin, end, num_prompt in zip(*(np.asarray(x).tolist() for x in (slot_M, begin_M, end_M, num_prompt_M)), strict=True):
        for position in range(begin, end) if slot >= 0 else ():
            token = int(tokens_NL[slot, position])
            seen_NV[slot, token] = int(seen_NV[slot, token]) | 1 if position < num_prompt else int(seen_NV[slot, token]) + 2


@implements("penalize", device="reference")
def penalize(
    logits_RV: Array, seen_NV: Array, slot_R: Array, repetition_R: Array, frequency_R: Array, presence_R: Array
) -> None:
    for r, slot in enumerate(np.asarray(slot_R).tolist()):
        if slot < 0:
            continue
        seen_V, x_V = np.asarray(seen_NV[slot]), np.asarray(logits_RV[r])
        repetition, frequency, presence = (np.float32(x[r]) for x in (repetition_R, frequency_R, presence_R))
        x_V = np.where(seen_V > 0, np.where(x_V > 0, x_V / repetition, x_V * repetition), x_V)
        count_V = (seen_V >> 1).astype(np.float32)
        logits_RV[r] = np.where(count_V > 0, x_V - (frequency * count_V + presence), x_V)


@implements("pick_logprobs", device="reference")
def pick_logprobs(logits_RV: Array, row_M: Array, logsumexp_M: Array, ids_MK: Array) -> tuple[Array, Array]:
    logits, ids = np.asarray(logits_RV)[np.asarray(row_M)], np.asarray(ids_MK)
    values = np.take_along_axis(logits, np.maximum(ids, 0), axis=1)
    found = np.where(ids >= 0, values - np.asarray(logsumexp_M)[:, None], -math.inf).astype(np.float32)
    return found, 1 + (logits > values[:, :1]).sum(axis=1).astype(np.int32)
