"""Plans become arrays: new requests, deltas, ragged rows, logits rows, several KV groups."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.base.plan import NewRequest, Scheduled, StepPlan
from pagoda.base.types import SamplingParams
from pagoda.worker.batch import BatchBuilder, Sizes
from pagoda.worker.table import RequestTable

BLOCK = 16


def new(slot: int, ids: list[int], blocks: list[list[int]], *, prompt: int | None = None, **params: object) -> NewRequest:
    return NewRequest(
        slot=slot, request_id=f"r{slot}", token_ids=ids, num_prompt_tokens=prompt or len(ids),
        params=SamplingParams(seed=slot, **params), block_ids=blocks,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def pair() -> tuple[RequestTable, BatchBuilder]:
    table = RequestTable(max_num_seqs=4, max_model_len=64, num_groups=2, max_blocks=4)
    return table, BatchBuilder(Sizes(128, 4, 128, 4), 2, BLOCK)


def test_ragged_batch(pair: tuple[RequestTable, BatchBuilder]) -> None:
    table, builder = pair
    first, second = list(range(100, 120)), list(range(200, 203))
    plan = StepPlan(
        step=0,
        new=[new(2, first, [[5, 6], [7, 8]]), new(0, second, [[9], [10]])],
        scheduled=[Scheduled(2, 0, 18), Scheduled(0, 0, 3)],
    )
    table.apply(plan)
    rows = builder.build(plan, table)
    assert (rows.num_tokens, rows.num_seqs, rows.num_rows) == (21, 2, 1)
    assert builder.token_ids_T[:21].tolist() == first[:18] + second
    assert builder.positions_T[:21].tolist() == [*range(18), 0, 1, 2]
    assert builder.query_start_S1[:3].tolist() == [0, 18, 21]
    assert builder.seq_lens_S[:2].tolist() == [18, 3]
    assert rows.is_sampled_S.tolist() == [False, True]
    assert builder.logits_idx_R[:1].tolist() == [20]
    assert builder.slots_gT[0][[0, 15, 16, 17, 18]].tolist() == [80, 95, 96, 97, 144]
    assert builder.slots_gT[1][[0, 16, 18]].tolist() == [112, 128, 160]
    assert builder.tables_gSB[1][0, :2].tolist() == [7, 8]


def test_deltas_and_sampled_tokens(pair: tuple[RequestTable, BatchBuilder]) -> None:
    table, builder = pair
    table.apply(StepPlan(step=0, new=[new(1, list(range(16)), [[3], [4]])], scheduled=[Scheduled(1, 0, 16)]))
    table.append_tokens(np.array([1]), np.array([77]))
    plan = StepPlan(step=1, scheduled=[Scheduled(1, 16, 1, [[8], [9]])])
    table.apply(plan)
    builder.build(plan, table)
    assert builder.token_ids_T[0] == 77
    assert [builder.slots_gT[g][0] for g in range(2)] == [8 * BLOCK, 9 * BLOCK]


def test_released_slot_is_taken_again(pair: tuple[RequestTable, BatchBuilder]) -> None:
    table, _ = pair
    table.apply(StepPlan(step=0, new=[new(1, [1, 2], [[3], [4]])]))
    with pytest.raises(AssertionError, match="slot 1 is taken"):
        table.apply(StepPlan(step=1, new=[new(1, [5], [[6], [7]])]))
    table.apply(StepPlan(step=1, released_slots=[1], new=[new(1, [5], [[6], [7]])]))
    assert table.tables_gNB[0, 1, 0] == 6 and table.num_tokens_N[1] == 1


def test_resumed_request_brings_prompt_and_output(pair: tuple[RequestTable, BatchBuilder]) -> None:
    table, builder = pair
    plan = StepPlan(step=0, new=[new(0, [1, 2, 3, 50, 51], [[3], [4]], prompt=3)], scheduled=[Scheduled(0, 0, 5)])
    table.apply(plan)
    rows = builder.build(plan, table)
    assert rows.is_sampled_S.tolist() == [True] and table.info(0).num_prompt_tokens == 3


def test_prompt_logprobs_ask_for_a_row_per_token(pair: tuple[RequestTable, BatchBuilder]) -> None:
    table, builder = pair
    plan = StepPlan(
        step=0,
        new=[new(0, list(range(10)), [[1], [2]], prompt_logprobs=1), new(1, [4, 5], [[3], [4]])],
        scheduled=[Scheduled(0, 0, 6), Scheduled(1, 0, 2)],
    )
    table.apply(plan)
    rows = builder.build(plan, table)
    assert rows.row_start_S1.tolist() == [0, 6, 7]
    assert builder.logits_idx_R[:7].tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert rows.first_position_S.tolist() == [0, 1]
    plan = StepPlan(step=1, scheduled=[Scheduled(0, 6, 4)])
    rows = builder.build(plan, table)
    assert rows.is_sampled_S.tolist() == [True] and rows.row_start_S1.tolist() == [0, 4]


def test_going_on_equals_building_anew(pair: tuple[RequestTable, BatchBuilder]) -> None:
    """Steps of pure decoding move the last batch by one token; a builder that never saw it must agree, block edges included."""
    table, builder = pair
    plan = StepPlan(
        step=0,
        new=[new(0, list(range(14)), [[1], [2]]), new(2, list(range(30)), [[3, 4], [5, 6]])],
        scheduled=[Scheduled(0, 0, 14), Scheduled(2, 0, 30)],
    )
    next_block = 7
    for step in range(20):
        table.apply(plan)
        fresh = BatchBuilder(builder.sizes, 2, BLOCK)
        rows, expected = builder.build(plan, table), fresh.build(plan, table)
        for name in ("num_tokens", "num_seqs", "num_rows", "num_sampled"):
            assert getattr(rows, name) == getattr(expected, name)
        for name in ("slots_S", "row_start_S1", "is_sampled_S"):
            assert getattr(rows, name).tolist() == getattr(expected, name).tolist()
        t, s = rows.num_tokens, rows.num_seqs
        assert builder.token_ids_T[:t].tolist() == fresh.token_ids_T[:t].tolist()
        assert builder.positions_T[:t].tolist() == fresh.positions_T[:t].tolist()
        assert builder.query_start_S1[: s + 1].tolist() == fresh.query_start_S1[: s + 1].tolist()
        assert builder.seq_lens_S[:s].tolist() == fresh.seq_lens_S[:s].tolist()
        assert builder.logits_idx_R[: rows.num_rows].tolist() == fresh.logits_idx_R[: rows.num_rows].tolist()
        for group in range(2):
            assert builder.slots_gT[group][:t].tolist() == fresh.slots_gT[group][:t].tolist()
            for row in range(s):
                width = -(-int(builder.seq_lens_S[row]) // BLOCK)
                assert builder.tables_gSB[group][row, :width].tolist() == fresh.tables_gSB[group][row, :width].tolist()
        table.append_tokens(rows.slots_S, np.array([step + 50, step + 90]))
        scheduled = []
        for slot in (0, 2):
            computed = int(table.num_tokens_N[slot]) - 1
            fresh_ids = []
            if computed % BLOCK == 0:
                fresh_ids = [[next_block], [next_block + 1]]
                next_block += 2
            scheduled.append(Scheduled(slot, computed, 1, fresh_ids))
        plan = StepPlan(step=step + 1, scheduled=scheduled)
