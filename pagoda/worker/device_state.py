"""What a device remembers of the running requests, and the inputs it makes of it for each step.

The host keeps `RequestTable`, as on a CPU; the device keeps the same of it in one array (`kernels/triton/prepare.py` draws it).
A step sends the plan's words and what has changed, in one copy from pinned memory, and nothing comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagoda.base.plan import StepPlan
from pagoda.kernels.triton.plane import DevicePlane
from pagoda.kernels.triton.prepare import (
    Counts,
    StateLayout,
    apply_changes,
    commit_tokens,
    prepare_rows,
    prepare_sequences,
)
from pagoda.layers.batch import Batch, GroupBatch
from pagoda.worker.batch import Sizes
from pagoda.worker.device import Device
from pagoda.worker.staging import Staging
from pagoda.worker.table import RequestTable

__all__ = ["Changes", "DeviceState", "Inputs"]

Array = Any
_FIRST_WORDS = 1 << 16


class Changes:
    """(index, word) pairs on their way to the device's state."""

    def __init__(self, layout: StateLayout) -> None:
        self._layout = layout
        self._indices: list[np.ndarray] = []
        self._words: list[np.ndarray] = []
        self._drawn: dict[int, tuple[int, int]] = {}  # slot -> position, id of a token that was drawn on the host
        self.count = 0
        self._may_repeat = False

    def add(self, index: np.ndarray, words: np.ndarray) -> None:
        """`words` are 32 bits each, of any type."""
        self._indices.append(index.astype(np.int32))
        self._words.append(np.ascontiguousarray(words).view(np.int32))
        self.count += len(index)

    def take(self, plan: StepPlan, table: RequestTable) -> None:
        """What the plan, which the table has applied, changed. Every index is named once: a slot that was released forgets first."""
        layout = self._layout
        for slot in plan.released_slots:
            self._drawn.pop(slot, None)
        for new in plan.new:
            n = len(new.token_ids)
            self.add(np.arange(n) + new.slot * layout.max_len, table.tokens_NL[new.slot, :n])
            for group, ids in enumerate(new.block_ids):
                self.blocks(group, new.slot, 0, ids)
            self._params(new.slot, table)
        index: list[int] = []
        words: list[int] = []
        for slot, (position, token) in self._drawn.items():
            index.append(slot * layout.max_len + position)
            words.append(token)
        self._drawn.clear()
        for row in plan.scheduled:
            if row.new_block_ids:
                for group, ids in enumerate(row.new_block_ids):
                    if ids:
                        end = int(table.num_blocks_gN[group, row.slot])
                        base = layout.tables + (group * layout.num_slots + row.slot) * layout.max_blocks
                        index += range(base + end - len(ids), base + end)
                        words += ids
            if row.appended_ids:
                end = row.slot * layout.max_len + int(table.num_tokens_N[row.slot])
                index += range(end - len(row.appended_ids), end)
                words += row.appended_ids
        if index:
            self.add(np.array(index), np.array(words, np.int32))
        if self._may_repeat and self._indices:
            self._drop_repeated()

    def failed(self) -> None:
        """A step could not be started: what it did not send goes with the next, which may write the same places."""
        self._may_repeat = True

    def _drop_repeated(self) -> None:
        """Of a place that is named more than once, the last word."""
        index, words = np.concatenate(self._indices), np.concatenate(self._words)
        last = len(index) - 1 - np.unique(index[::-1], return_index=True)[1]
        self._indices, self._words, self.count, self._may_repeat = [index[last]], [words[last]], len(last), False

    def blocks(self, group: int, slot: int, start: int, ids: Sequence[int]) -> None:
        layout = self._layout
        base = layout.tables + (group * layout.num_slots + slot) * layout.max_blocks + start
        self.add(np.arange(base, base + len(ids)), np.array(ids, np.int32))

    def _params(self, slot: int, table: RequestTable) -> None:
        layout = self._layout
        n, base = layout.num_slots, layout.params + slot
        floats = np.array([table.temperature_N[slot], table.top_p_N[slot], table.min_p_N[slot]], np.float32)
        self.add(np.array([base, base + n, base + 2 * n]), floats)
        self.add(np.array([base + 3 * n]), table.top_k_N[slot : slot + 1])
        seed = layout.params + 4 * n + 2 * slot
        self.add(np.array([seed, seed + 1]), table.seed_N[slot : slot + 1])

    def drawn(self, slot: int, position: int, token: int) -> None:
        """A token that was drawn on the host: the next plan carries it. One beyond the context is never computed."""
        if position < self._layout.max_len:
            self._drawn[slot] = (position, token)

    def put(self, words: np.ndarray) -> None:
        """Writes indices, then words, to the front of `words`, and forgets them."""
        if self.count:
            np.concatenate(self._indices, out=words[: self.count])
            np.concatenate(self._words, out=words[self.count : 2 * self.count])
            self._indices.clear()
            self._words.clear()
            self.count = 0


@dataclass(frozen=True)
class Inputs:
    """A batch at its largest, in persistent arrays that graphs read at fixed addresses."""

    token_ids_T: Array
    positions_T: Array
    query_start_S1: Array
    seq_lens_S: Array
    logits_idx_R: Array
    tables_gSB: Array
    kv_slots_gT: Array
    draw: tuple[Array, ...]  # as `ops.sample` takes them

    @staticmethod
    def allocate(device: Device, sizes: Sizes, num_groups: int) -> Inputs:
        t, s, r = sizes.max_tokens, sizes.max_seqs, max(sizes.max_rows, sizes.max_seqs)
        kinds = ("float32", "int32", "float32", "float32", "int64", "int64")
        return Inputs(
            device.zeros(t, "int32"), device.zeros(t, "int32"), device.zeros(s + 1, "int32"), device.zeros(s, "int32"),
            device.zeros(r, "int32"), device.zeros((num_groups, s, sizes.max_blocks), "int32"), device.zeros((num_groups, t), "int64"),
            tuple(device.zeros(r, kind) for kind in kinds),
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        arrays = (self.token_ids_T, self.positions_T, self.query_start_S1, self.seq_lens_S, self.logits_idx_R)
        return sum(int(x.nbytes) for x in (*arrays, self.tables_gSB, self.kv_slots_gT, *self.draw))

    def batch(self, num_tokens: int, num_seqs: int, num_rows: int, planes: tuple[DevicePlane, ...]) -> Batch:
        groups = tuple(
            GroupBatch(self.tables_gSB[g, :num_seqs], self.kv_slots_gT[g, :num_tokens]) for g in range(self.tables_gSB.shape[0])
        )
        return Batch(
            self.token_ids_T[:num_tokens], self.positions_T[:num_tokens], self.query_start_S1[: num_seqs + 1],
            self.seq_lens_S[:num_seqs], self.logits_idx_R[:num_rows], groups, planes,
        )  # fmt: skip


class DeviceState:
    """State, inputs and the pinned memory of the steps in flight. `num_steps` of them at most, and one being built."""

    def __init__(self, device: Device, layout: StateLayout, sizes: Sizes, block_size: int, *, num_steps: int, computes: bool = True) -> None:
        assert layout.num_words < 2**31, "the token table is larger than 8 GiB: lower --max-num-seqs or --max-model-len"
        self.layout, self._block_size, self._computes = layout, block_size, computes
        self._state = device.zeros(layout.num_words, "int32")
        self.inputs = Inputs.allocate(device, sizes, layout.num_groups)
        self.changes = Changes(layout)
        self._staging = Staging(device, num_steps + 1, _FIRST_WORDS)

    @property
    def nbytes(self) -> int:
        return int(self._state.nbytes) + self.inputs.nbytes + int(self._staging.words.nbytes)

    @property
    def tokens_NL(self) -> Array:
        """Every known token of every slot."""
        return self._state[: self.layout.tables].view(self.layout.num_slots, self.layout.max_len)

    def send(self, seqs: Sequence[np.ndarray], rows: Sequence[np.ndarray], num_padded: int) -> Counts:
        """One copy, and the kernels that make the step's inputs of it.

        `seqs`: slot S, start S, first S + 1. `rows`: token R, slot R, position R. `num_padded`: sequences of the graph that
        will run, 0 without one.
        """
        counts = Counts(self.changes.count, len(seqs[0]), len(rows[0]))
        words = self._staging.take(counts.num_words)
        self.changes.put(words)
        at = 2 * counts.changes
        for part in (*seqs, *rows):
            words[at : at + len(part)] = part
            at += len(part)
        self._staging.send(counts.num_words)
        if self._computes:
            self._prepare(counts, num_padded)
        return counts

    def _prepare(self, counts: Counts, num_padded: int) -> None:
        x = self.inputs
        if counts.changes:
            apply_changes(self._state, self._staging.words, counts.changes)
        prepare_sequences(
            self._state, self.layout, self._staging.words, counts, x.token_ids_T, x.positions_T, x.query_start_S1, x.seq_lens_S,
            x.tables_gSB, x.kv_slots_gT, num_padded=num_padded, block_size=self._block_size,
        )  # fmt: skip
        if counts.rows or num_padded:
            prepare_rows(self._state, self.layout, self._staging.words, counts, x.logits_idx_R, x.draw, num_padded=num_padded)

    def commit(self, counts: Counts, ids_R: Array) -> None:
        """The ids drawn of the step just sent, before the next is."""
        if self._computes:
            commit_tokens(self._state, self.layout, self._staging.words, counts, ids_R)
