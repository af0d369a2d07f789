"""What is done to many rows of logits at once on a GPU; on a CPU `worker/logits` does it row by row, where a request asks.

R rows, V vocabulary, N slots of the running batch (a request keeps its slot), M masks, K ids of a row. A row or a mask whose
slot or row is negative is skipped, so that a captured batch may hold padding.
"""

from __future__ import annotations

from typing import Any

from pagoda.kernels import reference as _reference  # registers the reference implementations
from pagoda.kernels.table import lookup

__all__ = ["apply_bitmask", "count_tokens", "penalize", "pick_logprobs"]

assert _reference
Array = Any


def apply_bitmask(logits_RV: Array, words_MW: Array, row_M: Array) -> None:
    """logits[row[m], v] = -inf unless bit v of mask m is set (32-bit words, low bits first; W = ceil(V / 32)). In place."""
    lookup("apply_bitmask", logits_RV)(logits_RV, words_MW, row_M)


def count_tokens(seen_NV: Array, slot_T: Array, token_T: Array, *, is_prompt: bool) -> None:
    """Notes tokens of slots for `penalize`. In place.

    seen is int32: the lowest bit says that the prompt has the token, the rest is twice how often the output has it. A
    slot may be named many times.
    """
    lookup("count_tokens", seen_NV)(seen_NV, slot_T, token_T, is_prompt=is_prompt)


def penalize(
    logits_RV: Array, seen_NV: Array, slot_R: Array, repetition_R: Array, frequency_R: Array, presence_R: Array
) -> None:
    """Penalties on tokens seen, in place, float32. n: times in the output.

    l = l / repetition if l > 0 else l * repetition, where prompt or output has the token; then
    l = l - (frequency * n + presence), where n > 0.
    """
    lookup("penalize", logits_RV)(logits_RV, seen_NV, slot_R, repetition_R, frequency_R, presence_R)


def pick_logprobs(logits_RV: Array, logsumexp_R: Array, ids_RK: Array) -> tuple[Array, Array]:
    """Log-probabilities of chosen ids, and the rank of the first of them -> float32 (R, K), int32 R.

    logits[r, ids[r, k]] - logsumexp[r]; -inf for a negative id. Rank 1 is the largest; equal logits share one.
    """
    return lookup("pick_logprobs", logits_RV)(logits_RV, logsumexp_R, ids_RK)  # type: ignore[no-any-return]
