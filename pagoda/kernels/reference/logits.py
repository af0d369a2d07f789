"""References of `pagoda.kernels.logits_ops`, on numpy arrays or torch tensors on the CPU, a row at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pagoda.kernels.table import implements

__all__ = ["apply_bitmask", "count_tokens", "penalize", "pick_logprobs"]

Array = Any


@implements("apply_bitmask", device="reference")
def apply_bitmask(logits_RV: Array, words_MW: Array, row_M: Array) -> None:
    for words, row in zip(np.asarray(words_MW), np.asarray(row_M).tolist(), strict=True):
        if row >= 0:
            bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")
            logits_RV[row][bits[: logits_RV.shape[1]] == 0] = -math.inf


@implements("count_tokens", device="reference")
def count_tokens(seen_NV: Array, slot_T: Array, token_T: Array, *, is_prompt: bool) -> None:
    for slot, token in zip(np.asarray(slot_T).tolist(), np.asarray(token_T).tolist(), strict=True):
        if slot >= 0 and is_prompt:
            seen_NV[slot, token] |= 1
        elif slot >= 0:
            seen_NV[slot, token] += 2


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
def pick_logprobs(logits_RV: Array, logsumexp_R: Array, ids_RK: Array) -> tuple[Array, Array]:
    logits, ids = np.asarray(logits_RV), np.asarray(ids_RK)
    values = np.take_along_axis(logits, np.maximum(ids, 0), axis=1)
    found = np.where(ids >= 0, values - np.asarray(logsumexp_R)[:, None], -math.inf).astype(np.float32)
    return found, 1 + (logits > values[:, :1]).sum(axis=1).astype(np.int32)
