"""What is done to many rows of logits at once on a GPU; on a CPU `worker/logits` does it row by row, where a request asks.

R rows, V vocabulary, N slots of the running batch (a request keeps its slot), L the longest sequence, M of the rows or slots, E edits,
K ids of a row. Where the row or slot is negative nothing is done.
"""

from __future__ import annotations

from typing import Any

from pagoda.kernels import reference as _reference  # registers the reference implementations
from pagoda.kernels.table import lookup

__all__ = ["add_at", "apply_bitmask", "copy_rows", "count_tokens", "penalize", "pick_logprobs", "put_ids", "top_tokens"]

assert _reference
Array = Any


def copy_rows(source_RV: Array, row_M: Array, out_NV: Array, place_M: Array | None = None) -> None:
    """out[place[m]] = source[row[m]], in the type of `out`; without places, out[m]."""
    lookup("copy_rows", source_RV)(source_RV, row_M, out_NV, place_M)


def add_at(logits_RV: Array, row_E: Array, id_E: Array, value_E: Array) -> None:
    """logits[row[e], id[e]] += value[e], float32, in place. A place is named by one finite value at most, and by any number of -inf."""
    lookup("add_at", logits_RV)(logits_RV, row_E, id_E, value_E)


def apply_bitmask(logits_RV: Array, words_MW: Array, row_M: Array) -> None:
    """logits[row[m], v] = -inf unless bit v of mask m is set (32-bit words, low bits first; W = ceil(V / 32)). In place."""
    lookup("apply_bitmask", logits_RV)(logits_RV, words_MW, row_M)


def count_tokens(
    seen_NV: Array, tokens_NL: Array, slot_M: Array, begin_M: Array, end_M: Array, num_prompt_M: Array, *, longest: int
) -> None:
    """Notes the tokens [begin, end) of some slots for `penalize`, in place. `longest`: no end - begin is larger.

    seen is int32: the lowest bit says that the prompt has the token, the rest is twice how often the output has it.
    """
    lookup("count_tokens", seen_NV)(seen_NV, tokens_NL, slot_M, begin_M, end_M, num_prompt_M, longest=longest)


def penalize(
    logits_RV: Array, seen_NV: Array, slot_R: Array, repetition_R: Array, frequency_R: Array, presence_R: Array
) -> None:
    """Penalties on tokens seen, in place, float32. n: times in the output.

    l = l / repetition if l > 0 else l * repetition, where prompt or output has the token; then
    l = l - (frequency * n + presence), where n > 0.
    """
    lookup("penalize", logits_RV)(logits_RV, seen_NV, slot_R, repetition_R, frequency_R, presence_R)


def put_ids(ids_R: Array, row_M: Array, id_M: Array, is_good_M: Array) -> None:
    """ids[row[m]] = id[m], or -1 where it is not good. In place."""
    lookup("put_ids", ids_R)(ids_R, row_M, id_M, is_good_M)


def top_tokens(logits_MV: Array, count: int) -> Array:
    """The `count` largest logits of every row, lower ids first where they are equal -> int32 ids (M, count)."""
    return lookup("top_tokens", logits_MV)(logits_MV, count)


def pick_logprobs(logits_RV: Array, row_M: Array, logsumexp_M: Array, ids_MK: Array) -> tuple[Array, Array]:
    """Log-probabilities of chosen ids, and the rank of the first of them -> float32 (M, K), int32 M.

    logits[row[m], ids[m, k]] - logsumexp[m]; -inf for a negative id. Rank 1 is the largest; equal logits share one.
    """
    return lookup("pick_logprobs", logits_RV)(logits_RV, row_M, logsumexp_M, ids_MK)  # type: ignore[no-any-return]
