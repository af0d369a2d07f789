"""From logits to tokens.

Order of operations for a row, documented once, here:

    0  raw log-probabilities are taken, if asked for (log-softmax of the model's logits, before anything below)
    1  the steps of `worker/logits`: allowed ids, bad words, min_tokens, logit_bias, penalties; then the grammar's mask.
       Where the two leave no token at all the grammar wins: the mask is laid on the logits as the model made them
    2  temperature 0: the largest logit, the lowest id on ties; otherwise softmax(logits / temperature)
    3  min_p    4  top_k    5  top_p, over what is left
    6  one draw: the counter-based random number of (seed, position), inverse cumulative distribution in id order

2 to 6 are one fused op for all rows of the step; a row that needs step 1 has its logits changed in place first, so
that every row is drawn with the same arithmetic and the same number, whatever its neighbours ask for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagoda.base.plan import Masks, StepRow
from pagoda.base.types import TokenLogprobs
from pagoda.kernels import ops
from pagoda.worker.batch import StepRows
from pagoda.worker.logits import STEPS, RowContext
from pagoda.worker.table import RequestTable

__all__ = ["Sampler", "top_logprobs"]

NOT_FINITE = "the model produced logits that are not finite for this request"


class Sampler:
    def sample(self, logits_RV: np.ndarray, rows: StepRows, table: RequestTable, masks: Masks | None = None) -> list[StepRow]:
        """One StepRow per sequence of the batch. Changes `logits_RV`; appends sampled tokens to the table."""
        results = [StepRow(slot=slot) for slot in rows.slots_S.tolist()]
        if rows.num_rows == 0:
            return results
        if rows.num_rows > rows.num_sampled:
            self._score_prompts(logits_RV, rows, table, results)
        if rows.num_sampled == 0:
            return results
        if rows.num_sampled == rows.num_rows == rows.num_seqs:
            chosen_S, row_R, slots, picked = range(rows.num_seqs), range(rows.num_rows), rows.slots_S, logits_RV
        else:
            chosen_S = np.flatnonzero(rows.is_sampled_S)
            row_R, slots = rows.row_start_S1[chosen_S + 1] - 1, rows.slots_S[chosen_S]
            picked = logits_RV if rows.num_sampled == rows.num_rows else None
        raw = _Raw()
        if masks or table.is_special_N[slots].any():
            self._prepare(raw, logits_RV, row_R, slots, table, masks)
        ids = ops.sample(
            logits_RV[row_R] if picked is None else picked, table.temperature_N[slots], table.top_k_N[slots],
            table.top_p_N[slots], table.min_p_N[slots], table.seed_N[slots], table.num_tokens_N[slots].astype(np.int64),
        )  # fmt: skip
        for i, (s, token) in enumerate(zip(chosen_S, ids.tolist(), strict=True)):
            result = results[s]
            if token < 0 or result.error or i in raw.failed:
                result.error = result.error or NOT_FINITE
            else:
                result.token_ids = [token]
        drawn = [i for i, s in enumerate(chosen_S) if results[s].error is None]
        table.append_tokens(*((slots, ids) if len(drawn) == len(ids) else (slots[drawn], ids[drawn])))
        for i, logits_V in raw.logits_V.items():
            result = results[chosen_S[i]]
            if result.error is None:
                count = table.info(int(slots[i])).params.logprobs or 0
                result.logprobs = [top_logprobs(logits_V, result.token_ids[0], count, raw.normalizer[i])]
        return results

    def _prepare(
        self,
        raw: _Raw,
        logits_RV: np.ndarray,
        row_R: Sequence[int] | np.ndarray,
        slots: np.ndarray,
        table: RequestTable,
        masks: Masks | None,
    ) -> None:
        """Keeps what logprobs need, then runs the steps in place; rows that ask for neither are passed over."""
        mask_of = {slot: i for i, slot in enumerate(masks.slots)} if masks else {}
        for i, (row, slot) in enumerate(zip(row_R, slots, strict=True)):
            masked = int(slot) in mask_of
            if not masked and not table.is_special_N[slot]:
                continue
            info = table.info(int(slot))
            steps = [step for step in STEPS if step.wants(info.params)]
            logits_V = logits_RV[row]
            if not ops.row_is_finite(logits_V[None])[0]:  # a mask would hide it
                raw.failed.add(i)
                continue
            if info.params.logprobs is not None:
                raw.logits_V[i] = logits_V.copy() if steps or masked else logits_V
                raw.normalizer[i] = float(ops.row_logsumexp(logits_V[None])[0])
            untouched_V = logits_V.copy() if steps and masked else None
            if steps:
                tokens = table.tokens_NL[slot, : table.num_tokens_N[slot]]
                context = RowContext(info.params, tokens, info.num_prompt_tokens, info.stop_ids)
                for step in steps:
                    step.apply(logits_V, context)
            if masks and masked:
                apply_mask(logits_V, masks, mask_of[int(slot)])
                if untouched_V is not None and logits_V.max() == -np.inf:
                    logits_V[:] = untouched_V
                    apply_mask(logits_V, masks, mask_of[int(slot)])

    def _score_prompts(
        self, logits_RV: np.ndarray, rows: StepRows, table: RequestTable, results: list[StepRow]
    ) -> None:
        """prompt_logprobs: the row at position p scores the prompt's token p + 1."""
        for s, slot in enumerate(rows.slots_S):
            start, stop = int(rows.row_start_S1[s]), int(rows.row_start_S1[s + 1])
            info = table.info(int(slot))
            count = info.params.prompt_logprobs
            if count is None or start == stop:
                continue
            position = int(rows.first_position_S[s])
            for row in range(start, stop):
                target = position + row - start + 1
                if target >= info.num_prompt_tokens:
                    break
                if not ops.row_is_finite(logits_RV[row][None])[0]:
                    results[s].error = NOT_FINITE
                    break
                normalizer = float(ops.row_logsumexp(logits_RV[row][None])[0])
                token = int(table.tokens_NL[slot, target])
                results[s].prompt_logprobs.append(top_logprobs(logits_RV[row], token, count, normalizer))


class _Raw:
    """Logits as the model made them, for rows that want logprobs."""

    def __init__(self) -> None:
        self.logits_V: dict[int, np.ndarray] = {}
        self.normalizer: dict[int, float] = {}
        self.failed: set[int] = set()


def apply_mask(logits_V: np.ndarray, masks: Masks, index: int) -> None:
    """-inf where the grammar's bit is 0."""
    num_words = (len(logits_V) + 31) // 32
    words = np.frombuffer(masks.words, np.uint32, num_words, index * num_words * 4)
    allowed_V = np.unpackbits(words.view(np.uint8), count=len(logits_V), bitorder="little").view(np.bool_)
    np.putmask(logits_V, ~allowed_V, -np.inf)


def top_logprobs(logits_V: np.ndarray, token: int, count: int, normalizer: float) -> TokenLogprobs:
    """The token's log-probability and rank, and the `count` largest (-1: all), by (value, id)."""
    value = logits_V[token]
    rank = int(np.count_nonzero(logits_V > value)) + 1
    ids = [token]
    if count == -1 or count >= len(logits_V):
        ids += np.argsort(-logits_V, kind="stable").tolist()
    elif count > 0:
        threshold = np.partition(logits_V, len(logits_V) - count)[len(logits_V) - count]
        candidates = np.flatnonzero(logits_V >= threshold)
        order = np.argsort(-logits_V[candidates], kind="stable")
        ids += candidates[order[:count]].tolist()
    values = (logits_V[ids].astype(np.float64) - normalizer).tolist()
    return TokenLogprobs(ids, values, rank)
