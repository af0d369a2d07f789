"""From logits to tokens.

Order of operations for a row, documented once, here and in `worker/logits`:

    0  raw log-probabilities are taken, if asked for (log-softmax of the model's logits, before anything below)
    1  the steps of `worker/logits`: allowed ids, bad words, min_tokens, logit_bias, penalties, DRY, plug-ins; then the
       grammar's mask. Where the two leave no token at all the grammar wins: the mask is laid on the logits as the model made them
    2  temperature 0: the largest logit, the lowest id on ties; otherwise the shaping steps (top_n_sigma, dynamic
       temperature, typical_p), and softmax(logits / temperature)
    3  min_p    4  top_k    5  top_p, over what is left; then XTC. Mirostat stands in the place of all four
    6  one draw: the counter-based random number of (seed, position), inverse cumulative distribution in id order

The draw with its temperature and truncations is one fused op for all rows of the step, at the end of the forward. A row that has
a grammar's mask and nothing else is drawn through the mask, by an op that leaves the logits alone. A row that needs more has its
logits changed in place first. All are drawn with the same arithmetic and the same number, whatever the neighbours ask for.
With `logprobs_mode` processed_* step 0 is taken before 6 instead, of what is left then, divided by the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagoda.base.log import get_logger
from pagoda.base.plan import NOT_FINITE, Masks, StepRow
from pagoda.base.types import SamplingParams, TokenLogprobs
from pagoda.kernels import ops
from pagoda.worker.batch import StepRows
from pagoda.worker.logits import Mirostat, ProcessorFailed, RowContext
from pagoda.worker.logits.truncate import truncate
from pagoda.worker.table import RequestTable, SlotInfo

__all__ = ["Sampler", "top_logprobs"]

_log = get_logger("worker")


class Sampler:
    def __init__(self) -> None:
        self._mirostat = Mirostat()

    def sample(
        self,
        logits_RV: np.ndarray,
        rows: StepRows,
        table: RequestTable,
        masks: Masks | None = None,
        drawn_R: np.ndarray | None = None,
    ) -> list[StepRow]:
        """One StepRow per sequence of the batch. Changes `logits_RV`; appends sampled tokens to the table.

        `drawn_R` are the ids the forward drew of all rows; they are taken for rows that need no more than the fused draw.
        """
        results = [StepRow(slot=slot) for slot in rows.slots_S.tolist()]
        if rows.num_rows == 0:
            return results
        if rows.num_rows > rows.num_sampled:
            self._score_prompts(logits_RV, rows, table, results)
        if rows.num_sampled == 0:
            return results
        chosen_I = np.flatnonzero(rows.is_sampled_S)
        row_I, slots = rows.row_start_S1[chosen_I + 1] - 1, rows.slots_S[chosen_I]
        raw = _Raw()
        ids = self._draw(raw, logits_RV, row_I, slots, table, masks, drawn_R)
        if raw.is_empty and rows.num_rows == rows.num_seqs == len(ids) and ids.min() >= 0:
            return _keep(table, rows, ids)
        for i, (s, token) in enumerate(zip(chosen_I.tolist(), ids.tolist(), strict=True)):
            result = results[s]
            if token < 0 or result.error or i in raw.errors:
                result.error = result.error or raw.errors.get(i, NOT_FINITE)
            else:
                result.token_ids = [token]
        drawn = [i for i, s in enumerate(chosen_I) if results[s].error is None]
        table.append_tokens(*((slots, ids) if len(drawn) == len(ids) else (slots[drawn], ids[drawn])))
        for i, logits_V in raw.logits_V.items():
            result = results[chosen_I[i]]
            if result.error is None:
                params = table.info(int(slots[i])).params
                result.logprobs = [top_logprobs(logits_V, result.token_ids[0], params.logprobs or 0, raw.normalizer[i], params.logprob_token_ids)]
        for i, (logits_V, info, context) in raw.drawn_from.items():
            if results[chosen_I[i]].error is None:
                self._mirostat.observe(logits_V, context, info.request_id, int(ids[i]))
        return results

    def _draw(
        self,
        raw: _Raw,
        logits_RV: np.ndarray,
        row_I: np.ndarray,
        slots_I: np.ndarray,
        table: RequestTable,
        masks: Masks | None,
        drawn_R: np.ndarray | None,
    ) -> np.ndarray:
        """The ids of the sampled rows I: through a mask, behind steps, or as the forward drew them."""
        if masks is not None and masks.slots == slots_I.tolist() and not table.is_special_N[slots_I].any():
            mask_MB = np.frombuffer(masks.words, np.uint8).reshape(len(slots_I), -1)
            return np.asarray(ops.sample_masked(logits_RV, row_I, mask_MB, *_parameters(table, slots_I)))
        num_rows = len(row_I)
        ids_I = np.empty(num_rows, np.int32) if drawn_R is None else drawn_R[row_I]
        is_late_I = np.ones(num_rows, np.bool_) if drawn_R is None else table.is_redrawn_N[slots_I]
        place_I = _places(masks, slots_I)
        is_masked_I = (place_I >= 0) & ~table.is_special_N[slots_I]
        masked = np.flatnonzero(is_masked_I)
        if masks is not None and len(masked):
            mask_MB = _bytes_of(masks, place_I[masked])
            ids_I[masked] = ops.sample_masked(logits_RV, row_I[masked], mask_MB, *_parameters(table, slots_I[masked]))
        late = np.flatnonzero(is_late_I & ~is_masked_I)
        if len(late):
            for i in late.tolist():
                self._prepare(raw, i, logits_RV[row_I[i]], int(slots_I[i]), table, masks, int(place_I[i]))
            late_RV = logits_RV if len(late) == len(logits_RV) else logits_RV[row_I[late]]
            ids_I[late] = ops.sample(late_RV, *_parameters(table, slots_I[late]))
        return ids_I

    def _prepare(
        self, raw: _Raw, i: int, logits_V: np.ndarray, slot: int, table: RequestTable, masks: Masks | None, place: int
    ) -> None:
        """Keeps what logprobs need, then runs a special row's steps in place. `place` is its mask's, -1 without."""
        if not table.is_special_N[slot]:
            return
        if not ops.row_is_finite(logits_V[None])[0]:  # a mask would hide it
            raw.errors[i] = NOT_FINITE
            return
        info, index = table.info(slot), place if place >= 0 else None
        context = RowContext(info.params, table.tokens_NL[slot, : table.num_tokens_N[slot]], info.num_prompt_tokens, info.stop_ids)
        if info.params.logprobs is not None and not _is_processed(info.params):
            raw.keep(i, logits_V.copy() if info.chain or index is not None else logits_V, info.params)
        try:
            self._run_chain(logits_V, info, context, masks, index)
        except ProcessorFailed as error:
            raw.errors[i] = str(error)
            return
        except Exception as error:  # a bug of ours, which shall cost its own request and no other
            _log.exception("request `%s`: its logits steps failed", info.request_id)
            raw.errors[i] = f"sampling failed: {type(error).__name__}: {error}"
            return
        if info.params.logprobs is not None and _is_processed(info.params):
            raw.keep(i, _processed(logits_V, info), info.params)
        if info.chain.has_mirostat:
            raw.drawn_from[i] = (logits_V, info, context)

    def _run_chain(self, logits_V: np.ndarray, info: SlotInfo, context: RowContext, masks: Masks | None, index: int | None) -> None:
        """Steps, mask, shapers, in place. `index` is the row's mask."""
        chain = info.chain
        untouched_V = logits_V.copy() if chain.steps and index is not None else None
        for step in chain.steps:
            step.apply(logits_V, context)
        if masks is not None and index is not None:
            apply_mask(logits_V, masks, index)
            if untouched_V is not None and logits_V.max() == -np.inf:
                logits_V[:] = untouched_V
                apply_mask(logits_V, masks, index)
        if (chain.shapers or chain.has_mirostat) and np.isfinite(logits_V.max()):
            for step in chain.shapers:
                step.apply(logits_V, context)
            if chain.has_mirostat:
                self._mirostat.apply(logits_V, context, info.request_id)

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
    """What the rows that are more than a fused draw left on the way."""

    def __init__(self) -> None:
        self.logits_V: dict[int, np.ndarray] = {}  # of rows that want logprobs
        self.normalizer: dict[int, float] = {}  # 0 where logits are wanted
        self.errors: dict[int, str] = {}
        self.drawn_from: dict[int, tuple[np.ndarray, SlotInfo, RowContext]] = {}  # of rows with Mirostat

    @property
    def is_empty(self) -> bool:
        return not (self.logits_V or self.errors or self.drawn_from)

    def keep(self, i: int, logits_V: np.ndarray, params: SamplingParams) -> None:
        wants_logits = (params.logprobs_mode or "").endswith("_logits")
        self.logits_V[i] = logits_V
        self.normalizer[i] = 0.0 if wants_logits else float(ops.row_logsumexp(logits_V[None])[0])


def _is_processed(params: SamplingParams) -> bool:
    return (params.logprobs_mode or "").startswith("processed_")


def _processed(logits_V: np.ndarray, info: SlotInfo) -> np.ndarray:
    """A copy of the row as the fused draw sees it behind its truncations."""
    copy_V, params = logits_V.copy(), info.params
    if params.temperature > 0 and np.isfinite(copy_V.max()):
        if not info.chain.is_truncated:
            truncate(copy_V, params)
        copy_V /= np.float32(params.temperature)
    return copy_V


def _keep(table: RequestTable, rows: StepRows, ids_S: np.ndarray) -> list[StepRow]:
    """One token for every sequence of the step."""
    table.append_tokens(rows.slots_S, ids_S)
    return [StepRow(slot=slot, token_ids=[token]) for slot, token in zip(rows.slots_S.tolist(), ids_S.tolist(), strict=True)]


def _parameters(table: RequestTable, slots: np.ndarray) -> tuple[np.ndarray, ...]:
    """What `ops.sample` asks of each row, in its order."""
    return (
        table.temperature_N[slots], table.top_k_N[slots], table.top_p_N[slots], table.min_p_N[slots], table.seed_N[slots],
        table.num_tokens_N[slots].astype(np.int64),
    )  # fmt: skip


def _places(masks: Masks | None, slots_I: np.ndarray) -> np.ndarray:
    """Which mask each slot has; -1 without."""
    if masks is None or not masks.slots:
        return np.full(len(slots_I), -1)
    place_of = {slot: place for place, slot in enumerate(masks.slots)}
    return np.array([place_of.get(slot, -1) for slot in slots_I.tolist()])


def _bytes_of(masks: Masks, places: np.ndarray) -> np.ndarray:
    """Their masks, a row each; no copy where these are all."""
    mask_MB = np.frombuffer(masks.words, np.uint8).reshape(len(masks.slots), -1)
    is_all = len(places) == len(mask_MB) and np.array_equal(places, np.arange(len(places)))
    return mask_MB if is_all else mask_MB[places]


_OF_BYTE_8 = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf).astype(np.float32)


def apply_mask(logits_V: np.ndarray, masks: Masks, index: int) -> None:
    """-inf where the grammar's bit is 0: eight numbers looked up per byte of the mask, and added."""
    size = len(logits_V)
    num_words = (size + 31) // 32
    mask = np.frombuffer(masks.words, np.uint8, num_words * 4, index * num_words * 4)
    logits_V += np.take(_OF_BYTE_8, mask, axis=0).reshape(-1)[:size]


def top_logprobs(
    logits_V: np.ndarray, token: int, count: int, normalizer: float, instead: Sequence[int] | None = None
) -> TokenLogprobs:
    """The token's log-probability and rank, and the `count` largest (-1: all), by (value, id); or those of the tokens `instead`."""
    value = logits_V[token]
    rank = int(np.count_nonzero(logits_V > value)) + 1
    ids = [token]
    if instead is not None:
        ids += instead
    elif count == -1 or count >= len(logits_V):
        ids += np.argsort(-logits_V, kind="stable").tolist()
    elif count > 0:
        threshold = np.partition(logits_V, len(logits_V) - count)[len(logits_V) - count]
        candidates = np.flatnonzero(logits_V >= threshold)
        order = np.argsort(-logits_V[candidates], kind="stable")
        ids += candidates[order[:count]].tolist()
    values = (logits_V[ids].astype(np.float64) - normalizer).tolist()
    return TokenLogprobs(ids, values, rank, instead is None)
