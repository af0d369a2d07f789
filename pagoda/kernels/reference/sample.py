"""Reference of the sampler: one row at a time, in the order the docstring of `ops.sample` gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagoda.kernels.table import implements

__all__ = ["philox_uniform", "sample", "sample_masked"]

Array = Any
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_uniform(seed: int, position: int) -> float:
    """u in [0, 1) from Philox4x32-10 with key = seed (64 bits) and counter = (position, 0)."""
    seed, position = seed & (2**64 - 1), position & (2**64 - 1)
    key = [seed & _MASK, seed >> 32]
    counter = [position & _MASK, position >> 32, 0, 0]
    for _ in range(10):
        first = _MULTIPLIERS[0] * counter[0]
        second = _MULTIPLIERS[1] * counter[2]
        counter = [(second >> 32) ^ counter[1] ^ key[0], second & _MASK, (first >> 32) ^ counter[3] ^ key[1], first & _MASK]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return ((counter[0] >> 5) * 67108864 + (counter[1] >> 6)) / 9007199254740992


@implements("sample", device="reference")
def sample(
    logits_RV: Array,
    temperature_R: Array,
    top_k_R: Array,
    top_p_R: Array,
    min_p_R: Array,
    seed_R: Array,
    position_R: Array,
) -> Array:
    columns = zip(logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R, strict=True)
    ids = [_sample_row(np.asarray(row), float(t), int(k), float(p), float(m), int(s), int(i)) for row, t, k, p, m, s, i in columns]
    return np.asarray(ids, np.int32)


@implements("sample_masked", device="reference")
def sample_masked(logits_RV: Array, row_M: Array, mask_MB: Array, *parameters_M: Array) -> Array:
    logits_MV = np.asarray(logits_RV)[np.asarray(row_M)]
    allowed_MV = np.unpackbits(np.asarray(mask_MB), axis=1, bitorder="little", count=logits_MV.shape[1])
    return sample(np.where((allowed_MV == 1) | ~(logits_MV < np.inf), logits_MV, -np.inf), *parameters_M)


def _sample_row(
    logits_V: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    x = logits_V.astype(np.float64)
    if np.isnan(x).any() or not np.isfinite(x.max()):
        return -1
    best = int(np.argmax(x))  # the lowest id on ties
    if temperature <= 0:
        return best
    p = np.exp((x - x[best]) / temperature)  # the largest is 1; the common factor cancels everywhere below
    order = np.argsort(-x, kind="stable")  # logits descending, ids ascending
    kept = order[(p[order] >= min_p) & (p[order] > 0)]
    if top_k > 0:
        kept = kept[:top_k]
    if top_p < 1:
        mass = np.cumsum(p[kept])
        kept = kept[: int(np.searchsorted(mass, top_p * mass[-1], side="left")) + 1]
    kept = np.sort(kept)
    mass = np.cumsum(p[kept])
    return int(kept[min(int(np.searchsorted(mass, philox_uniform(seed, position) * mass[-1], side="right")), len(kept) - 1)])
