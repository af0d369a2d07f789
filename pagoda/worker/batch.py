"""Builds the step's batch in persistent arrays, so that a recorded program can hold their addresses.

No loop over tokens: everything ragged is written with `repeat` and fancy indexing over the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pagoda.base.plan import StepPlan
from pagoda.layers.batch import Batch, GroupBatch
from pagoda.worker.kv_store import KvStore
from pagoda.worker.table import RequestTable

__all__ = ["BatchBuilder", "Sizes", "StepRows"]


@dataclass(frozen=True)
class Sizes:
    """Upper bounds of a step: tokens, sequences, logits rows, blocks of one sequence."""

    max_tokens: int
    max_seqs: int
    max_rows: int
    max_blocks: int


@dataclass(frozen=True)
class StepRows:
    """What the sampler needs to know of a batch.

    Logits rows of sequence s are [row_start[s], row_start[s + 1]); the last of them is sampled if `is_sampled[s]`,
    the others score prompt tokens.
    """

    num_tokens: int
    num_seqs: int
    num_rows: int
    num_sampled: int
    slots_S: np.ndarray
    row_start_S1: np.ndarray
    is_sampled_S: np.ndarray
    first_position_S: np.ndarray  # position of the token at the sequence's first logits row
    is_plain: bool = False  # every sequence has one row, sampled, and nothing but the fused draw decides it


@dataclass(frozen=True)
class DrawInputs:
    """What `ops.sample` asks of every logits row. Rows that are not drawn, or not by the fused op alone, have temperature
    -1: nobody reads their answers."""

    temperature_R: np.ndarray
    top_k_R: np.ndarray
    top_p_R: np.ndarray
    min_p_R: np.ndarray
    seed_R: np.ndarray
    position_R: np.ndarray

    @staticmethod
    def allocate(num_rows: int) -> DrawInputs:
        kinds = (np.float32, np.int32, np.float32, np.float32, np.uint64, np.int64)
        return DrawInputs(*(np.zeros(num_rows, kind) for kind in kinds))

    def arrays(self) -> tuple[np.ndarray, ...]:
        """In the order of the op's operands."""
        return (self.temperature_R, self.top_k_R, self.top_p_R, self.min_p_R, self.seed_R, self.position_R)

    def fill(self, table: RequestTable, slot_R: np.ndarray, is_drawn_R: np.ndarray | None) -> None:
        """Rows belong to `slot_R`; `is_drawn_R` None: all are drawn."""
        n = len(slot_R)
        temperature_R = table.temperature_N[slot_R]
        if is_drawn_R is not None:
            temperature_R[~is_drawn_R] = -1
        temperature_R[table.is_redrawn_N[slot_R]] = -1
        self.temperature_R[:n] = temperature_R
        self.top_k_R[:n] = table.top_k_N[slot_R]
        self.top_p_R[:n] = table.top_p_N[slot_R]
        self.min_p_R[:n] = table.min_p_N[slot_R]
        self.seed_R[:n] = table.seed_N[slot_R]
        self.position_R[:n] = table.num_tokens_N[slot_R]


class BatchBuilder:
    def __init__(self, sizes: Sizes, num_groups: int, block_size: int) -> None:
        self.sizes = sizes
        self._block_size = block_size
        t, s, r = sizes.max_tokens, sizes.max_seqs, sizes.max_rows
        self.token_ids_T = np.zeros(t, np.int32)
        self.source_T = np.full(t, -1, np.int32)  # the row of the step before whose draw this token is; -1: the token is known
        self.positions_T = np.zeros(t, np.int32)
        self.query_start_S1 = np.zeros(s + 1, np.int32)
        self.seq_lens_S = np.zeros(s, np.int32)
        self.logits_idx_R = np.zeros(r, np.int32)
        self.tables_gSB = [np.zeros((s, sizes.max_blocks), np.int32) for _ in range(num_groups)]
        self.slots_gT = [np.zeros(t, np.int64) for _ in range(num_groups)]
        self.draw = DrawInputs.allocate(r)
        self._last: StepRows | None = None  # the last step, if every row of it computed one token and was sampled
        self._last_slots: list[int] = []

    @property
    def nbytes(self) -> int:
        arrays = [self.token_ids_T, self.source_T, self.positions_T, self.query_start_S1, self.seq_lens_S, self.logits_idx_R]
        return sum(a.nbytes for a in [*arrays, *self.tables_gSB, *self.slots_gT])

    def build(self, plan: StepPlan, table: RequestTable) -> StepRows:
        """Fills the arrays from the plan and the table."""
        rows = plan.scheduled
        if self._last is not None and self._goes_on(plan):
            return self._advance(table, self._last)
        num_seqs = len(rows)
        numbers = np.array([(row.slot, row.num_computed, row.num_planned) for row in rows], np.int32)
        slots_S, start_S, planned_S = numbers.T
        ends_S = start_S + planned_S
        stops = np.cumsum(planned_S, dtype=np.int32)
        num_tokens = int(stops[-1])
        assert num_tokens <= self.sizes.max_tokens and num_seqs <= self.sizes.max_seqs, "the plan passes the step's limits"

        self.query_start_S1[1 : num_seqs + 1] = stops
        self.seq_lens_S[:num_seqs] = ends_S
        slot_T, positions_T = slots_S, start_S
        if num_tokens != num_seqs:
            slot_T = np.repeat(slots_S, planned_S)
            positions_T = np.arange(num_tokens, dtype=np.int32) + np.repeat(ends_S - stops, planned_S)
        self.positions_T[:num_tokens] = positions_T
        self.token_ids_T[:num_tokens] = table.tokens_NL[slot_T, positions_T]
        self._build_kv(table, slots_S, slot_T, positions_T, int(ends_S.max()))
        built = self._build_rows(table, slots_S, start_S, planned_S, stops)
        is_decode = num_tokens == num_seqs == built.num_sampled
        self._last, self._last_slots = (built, slots_S.tolist()) if is_decode else (None, [])
        return built

    def follow(self, rows: StepRows, row_N: np.ndarray | None) -> None:
        """Names the tokens that the step before is still drawing: `row_N` holds the row of each slot's, -1 without; None: all are known."""
        self.source_T[: rows.num_tokens] = -1
        if row_N is not None:
            self.source_T[self.query_start_S1[: rows.num_seqs]] = row_N[rows.slots_S]

    def _goes_on(self, plan: StepPlan) -> bool:
        """Every row of the last step computes its next token, and nothing else happens."""
        rows = plan.scheduled
        if plan.new or len(rows) != len(self._last_slots) or [row.slot for row in rows] != self._last_slots:
            return False
        computed = [row.num_computed for row in rows]
        return computed == self.seq_lens_S[: len(rows)].tolist() and all(row.num_planned == 1 and not row.appended_ids for row in rows)

    def _advance(self, table: RequestTable, last: StepRows) -> StepRows:
        """The last batch moved by one token: most steps of a server are this, so it is worth its few lines."""
        n, slots_S = last.num_seqs, last.slots_S
        positions_T = self.positions_T[:n]
        positions_T += 1
        self.seq_lens_S[:n] += 1
        self.draw.position_R[:n] += 1
        self.token_ids_T[:n] = table.tokens_NL[slots_S, positions_T]
        crossed = np.flatnonzero(positions_T % self._block_size == 0)
        for group, (out_SB, out_T) in enumerate(zip(self.tables_gSB, self.slots_gT, strict=True)):
            out_T[:n] += 1
            if len(crossed):
                block = positions_T[crossed] // self._block_size
                ids = table.tables_gNB[group][slots_S[crossed], block]
                out_SB[crossed, block] = ids
                out_T[crossed] = ids.astype(np.int64) * self._block_size
        return last

    def _build_kv(
        self, table: RequestTable, slots_S: np.ndarray, slot_T: np.ndarray, positions_T: np.ndarray, longest: int
    ) -> None:
        width = -(-longest // self._block_size)
        block_T = positions_T // self._block_size
        offset_T = positions_T - block_T * self._block_size
        for group, (out_SB, out_T) in enumerate(zip(self.tables_gSB, self.slots_gT, strict=True)):
            ids_NB = table.tables_gNB[group]
            out_SB[: len(slots_S), :width] = ids_NB[slots_S, :width]
            ids_T = ids_NB[slot_T, block_T].astype(np.int64)
            out_T[: len(slot_T)] = ids_T * self._block_size + offset_T

    def _build_rows(
        self, table: RequestTable, slots_S: np.ndarray, start_S: np.ndarray, planned_S: np.ndarray, stops: np.ndarray
    ) -> StepRows:
        num_seqs = len(slots_S)
        ends_S = start_S + planned_S
        is_sampled_S = ends_S == table.num_tokens_N[slots_S]
        num_sampled = int(np.count_nonzero(is_sampled_S))
        count_S = is_sampled_S.astype(np.int32)
        scored_S = table.wants_prompt_logprobs_N[slots_S]
        if scored_S.any():
            for s in np.flatnonzero(scored_S):
                if start_S[s] < table.info(int(slots_S[s])).num_prompt_tokens:
                    count_S[s] = planned_S[s]
        row_start_S1 = np.zeros(num_seqs + 1, np.int32)
        np.cumsum(count_S, out=row_start_S1[1:])
        num_rows = int(row_start_S1[-1])
        assert num_rows <= self.sizes.max_rows, "the plan asks for more logits rows than there is room for"
        first_row_S = stops - count_S  # the rows wanted are a sequence's last ones
        is_plain = num_rows == num_seqs == num_sampled
        if is_plain:
            is_plain = not table.is_redrawn_N[slots_S].any()
            self.logits_idx_R[:num_rows] = first_row_S
            self.draw.fill(table, slots_S, None)
        else:
            is_drawn_R = np.zeros(num_rows, np.bool_)
            is_drawn_R[row_start_S1[1:][is_sampled_S] - 1] = True
            self.draw.fill(table, np.repeat(slots_S, count_S), is_drawn_R)
            inside = np.arange(num_rows, dtype=np.int32) - np.repeat(row_start_S1[:-1], count_S)
            self.logits_idx_R[:num_rows] = np.repeat(first_row_S, count_S) + inside
        return StepRows(
            num_tokens=int(stops[-1]), num_seqs=num_seqs, num_rows=num_rows, num_sampled=num_sampled, slots_S=slots_S,
            row_start_S1=row_start_S1, is_sampled_S=is_sampled_S, first_position_S=ends_S - count_S, is_plain=is_plain,
        )  # fmt: skip

    def whole(self, store: KvStore) -> Batch:
        """The batch at its largest, for recording: every array at its persistent address."""
        groups = tuple(GroupBatch(tables, slots) for tables, slots in zip(self.tables_gSB, self.slots_gT, strict=True))
        return Batch(
            self.token_ids_T, self.positions_T, self.query_start_S1, self.seq_lens_S, self.logits_idx_R, groups, store.planes
        )

    def view(self, rows: StepRows, store: KvStore) -> Batch:
        """The batch of this step, for running op by op."""
        t, s, r = rows.num_tokens, rows.num_seqs, rows.num_rows
        groups = tuple(GroupBatch(tables[:s], slots[:t]) for tables, slots in zip(self.tables_gSB, self.slots_gT, strict=True))
        return Batch(
            self.token_ids_T[:t], self.positions_T[:t], self.query_start_S1[: s + 1], self.seq_lens_S[:s],
            self.logits_idx_R[:r], groups, store.planes,
        )  # fmt: skip
