"""The inputs of a step, made on the device from what it remembers: the host sends what changed, a few integers a sequence.

All that is remembered lies in one array of 32-bit words, `state`, so that any change is an (index, word) pair:

    tokens       N x L     every known token of a slot, sampled ones included
    tables   g x N x B     block ids per KV group
    temperature, top_p, min_p    N floats each        top_k    N        seed    N x 2, low word first

N slots, L the longest sequence, B blocks of it. A plan comes as one run of words, `stage`:

    index D | value D | slot S | start S | first S + 1 | token R | slot R | position R

D changes; S sequences, whose tokens [start, start + first[s + 1] - first[s]) are computed as rows first[s].. of the batch; R rows
of logits: at which row of the batch, of which slot, and the position of the token drawn from it, or -1 - position where
nothing is drawn now. Rows of the batch beyond what the plan fills, up to a graph's size, are padding: they have slot -1
and no length, so that nothing is written for them and no key read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from pagoda.kernels.triton.launch import cdiv, index, launch

__all__ = ["Counts", "StateLayout", "apply_changes", "commit_tokens", "prepare_rows", "prepare_sequences"]

Array = Any
_BLOCK = 256


@dataclass(frozen=True)
class StateLayout:
    """Where the parts of `state` begin, in words."""

    num_slots: int
    max_len: int
    num_groups: int
    max_blocks: int

    @property
    def tables(self) -> int:
        return self.num_slots * self.max_len

    @property
    def params(self) -> int:
        """temperature, top_p, min_p, top_k: one word a slot each, then the seeds."""
        return self.tables + self.num_groups * self.num_slots * self.max_blocks

    @property
    def num_words(self) -> int:
        return self.params + 6 * self.num_slots


@triton.jit(do_not_specialize=["count"])
def _changes_kernel(state, stage, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(stage + at, mask=at < count, other=0)
    tl.store(state + place, tl.load(stage + count + at, mask=at < count, other=0), mask=at < count)


@triton.jit(do_not_specialize=["num_changes", "num_seqs"])
def _sequences_kernel(
    state, stage, token_ids, positions, query_start, seq_lens, tables, kv_slots,
    num_changes, num_seqs, max_len, num_slots, max_blocks, table_base, group_stride, table_stride, kv_stride,
    GROUPS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    slots = stage + 2 * num_changes
    starts = slots + num_seqs
    firsts = starts + num_seqs
    if s < num_seqs:
        slot = tl.load(slots + s).to(tl.int64)
        start = tl.load(starts + s)
        first = tl.load(firsts + s)
        stop = tl.load(firsts + s + 1)
        end = start + stop - first
        tl.store(seq_lens + s, end)
        tl.store(query_start + s + 1, stop)
        if s == 0:
            tl.store(query_start, 0)
        for begin in range(0, index(stop - first), BLOCK):
            live = begin + at < stop - first
            position = start + begin + at
            row = first + begin + at
            token = tl.load(state + slot * max_len + position, mask=live, other=0)
            tl.store(token_ids + row, token, mask=live)
            tl.store(positions + row, position, mask=live)
            for group in tl.static_range(GROUPS):
                table = state + table_base + (group * num_slots + slot) * max_blocks
                block = tl.load(table + position // PAGE, mask=live, other=0).to(tl.int64)
                tl.store(kv_slots + group * kv_stride + row, block * PAGE + position % PAGE, mask=live)
        for group in tl.static_range(GROUPS):
            table = state + table_base + (group * num_slots + slot) * max_blocks
            target = tables + group * group_stride + s.to(tl.int64) * table_stride
            for begin in range(0, index((end + PAGE - 1) // PAGE), BLOCK):
                live = begin + at < (end + PAGE - 1) // PAGE
                tl.store(target + begin + at, tl.load(table + begin + at, mask=live, other=0), mask=live)
    else:  # padding of a graph, in which row s of the batch belongs to sequence s
        tl.store(seq_lens + s, 0)
        tl.store(query_start + s + 1, tl.load(firsts + num_seqs))
        tl.store(token_ids + s, 0)
        tl.store(positions + s, 0)
        for group in tl.static_range(GROUPS):
            tl.store(kv_slots + group * kv_stride + s, -1)


@triton.jit(do_not_specialize=["row_base", "num_rows", "num_padded"])
def _rows_kernel(
    state, stage, logits_idx, temperatures, top_ks, top_ps, min_ps, seeds, draws,
    row_base, num_rows, num_padded, param_base, num_slots, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    inside = row < num_padded
    params = state + param_base
    tl.store(logits_idx + row, tl.load(stage + row_base + row, mask=live, other=0), mask=inside)
    slot = tl.load(stage + row_base + num_rows + row, mask=live, other=0).to(tl.int64)
    place = tl.load(stage + row_base + 2 * num_rows + row, mask=live, other=-1)
    temperature = tl.load(params + slot, mask=live, other=0).to(tl.float32, bitcast=True)
    tl.store(temperatures + row, tl.where(place >= 0, temperature, 0.0), mask=inside)
    tl.store(top_ps + row, tl.load(params + num_slots + slot, mask=live, other=0).to(tl.float32, bitcast=True), mask=inside)
    tl.store(min_ps + row, tl.load(params + 2 * num_slots + slot, mask=live, other=0).to(tl.float32, bitcast=True), mask=inside)
    tl.store(top_ks + row, tl.load(params + 3 * num_slots + slot, mask=live, other=0), mask=inside)
    low = tl.load(params + 4 * num_slots + 2 * slot, mask=live, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
    high = tl.load(params + 4 * num_slots + 2 * slot + 1, mask=live, other=0).to(tl.int64)
    tl.store(seeds + row, (high << 32) | low, mask=inside)
    tl.store(draws + row, place.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["row_base", "num_rows"])
def _commit_kernel(state, stage, ids, row_base, num_rows, max_len, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(stage + row_base + 2 * num_rows + row, mask=row < num_rows, other=-1)
    slot = tl.load(stage + row_base + num_rows + row, mask=row < num_rows, other=0).to(tl.int64)
    fits = (place >= 0) & (place < max_len)
    tl.store(state + slot * max_len + place, tl.load(ids + row, mask=row < num_rows, other=0), mask=fits)


class Counts(NamedTuple):
    """What `stage` holds: D, S and R of the drawing above."""

    changes: int
    seqs: int
    rows: int

    @property
    def row_base(self) -> int:
        return 2 * self.changes + 3 * self.seqs + 1

    @property
    def num_words(self) -> int:
        return self.row_base + 3 * self.rows


def apply_changes(state: Array, stage: Array, count: int) -> None:
    """state[stage[i]] = stage[count + i] for i < count. An index is named once at most."""
    launch(_changes_kernel, (cdiv(count, _BLOCK),), state, stage, count, BLOCK=_BLOCK)


def prepare_sequences(
    state: Array, layout: StateLayout, stage: Array, counts: Counts, token_ids_T: Array, positions_T: Array, query_start_S1: Array,
    seq_lens_S: Array, tables_gSB: Array, kv_slots_gT: Array, *, num_padded: int, block_size: int,
) -> None:  # fmt: skip
    """Fills the batch from the state: token ids, positions, places in the KV cache, block tables, lengths.

    With `num_padded` sequences, more than there are, the batch is one of a graph: a token each.
    """
    launch(
        _sequences_kernel, (max(counts.seqs, num_padded),), state, stage, token_ids_T, positions_T, query_start_S1,
        seq_lens_S, tables_gSB, kv_slots_gT, counts.changes, counts.seqs, layout.max_len, layout.num_slots, layout.max_blocks,
        layout.tables, tables_gSB.stride(0), tables_gSB.stride(1), kv_slots_gT.stride(0),
        GROUPS=layout.num_groups, PAGE=block_size, BLOCK=_BLOCK,
    )  # fmt: skip


def prepare_rows(
    state: Array, layout: StateLayout, stage: Array, counts: Counts, logits_idx_R: Array, draw: tuple[Array, ...], *, num_padded: int
) -> None:
    """Fills what `ops.sample` is asked of each row, in its order; a row that is not drawn now has temperature 0."""
    temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R = draw
    rows = max(counts.rows, num_padded)
    launch(
        _rows_kernel, (cdiv(rows, _BLOCK),), state, stage, logits_idx_R, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R,
        counts.row_base, counts.rows, rows, layout.params, layout.num_slots, BLOCK=_BLOCK,
    )  # fmt: skip


def commit_tokens(state: Array, layout: StateLayout, stage: Array, counts: Counts, ids_R: Array) -> None:
    """Drawn tokens become known tokens of their slots, which the next step reads."""
    launch(_commit_kernel, (cdiv(counts.rows, _BLOCK),), state, stage, ids_R, counts.row_base, counts.rows, layout.max_len, BLOCK=_BLOCK)
