"""The runner of a device with a stream of its own: `forward` starts a step and returns, `sample` waits for what it drew.

    forward(N)     send what changed | prepare inputs | forward | draw | tokens into the token table | ids on their way back
    forward(N+1)   the same, behind it in the stream: its inputs are the tokens that N draws, which the host has not seen
    sample(N)      waits for N's ids, the one wait there is

Who draws a row is its request's kind (`device_steps`). Log-probabilities, biases, bans and penalties are the device's own. A row with a
grammar is kept on the device until its mask is there, and drawn beside the next forward. Whatever else a request may want is drawn on
the host, from a copy of its logits, by the same code as on a CPU. The last two are late: the brain never plans such a request
ahead of its draw, so the next forward waits for no mask; its token comes with a later plan.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagoda.base.plan import Masks, StepPlan, StepResult, StepRow
from pagoda.base.types import DrawsAhead
from pagoda.kernels import ops
from pagoda.kernels.triton.prepare import Counts
from pagoda.worker.batch import Sizes, StepRows
from pagoda.worker.device import Device, Event, Pinned, memory_errors
from pagoda.worker.device_graphs import DeviceForward
from pagoda.worker.device_state import DeviceState
from pagoda.worker.device_steps import DeviceSteps, Drawn, Kind
from pagoda.worker.device_store import DeviceStore
from pagoda.worker.sampler import NOT_FINITE, Sampler
from pagoda.worker.table import RequestTable

__all__ = ["DeviceRunner"]

Array = Any


@dataclass(frozen=True)
class _Rows:
    """A step as the host sees it. S sequences, R rows of logits."""

    num_tokens: int
    slots_S: np.ndarray
    starts_S: np.ndarray
    first_S1: np.ndarray
    ends_S: np.ndarray  # position behind the last token computed: where a drawn token goes
    row_start_S1: np.ndarray
    early_S: np.ndarray  # drawn on the device
    stepped_S: np.ndarray  # those of them that are more than a fused draw
    kept_S: np.ndarray  # drawn on the device once their masks are there
    late_S: np.ndarray  # drawn, or prompts scored, on the host
    is_sampled_S: np.ndarray
    token_R: np.ndarray
    slot_R: np.ndarray
    place_R: np.ndarray
    is_decode: bool


@dataclass
class _Buffers:
    """Pinned memory of one step in flight."""

    event: Event
    ids: Pinned
    logits: Pinned | None = None
    words: Pinned | None = None  # of log-probabilities


@dataclass
class _Launched:
    step: int
    rows: _Rows | None = None
    buffers: _Buffers | None = None
    drawn: Drawn | None = None
    late_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    started: float = 0.0


class DeviceRunner:
    """`num_steps`: how many may be between their halves; `dtype`: of logits."""

    def __init__(
        self, device: Device, table: RequestTable, state: DeviceState, forward: DeviceForward, store: DeviceStore, sizes: Sizes,
        vocab_size: int, *, num_steps: int, dtype: str = "float32", computes: bool = True,
    ) -> None:  # fmt: skip
        self.table, self.sizes = table, sizes
        self._device, self._state, self._forward, self._store = device, state, forward, store
        self._vocab_size, self._computes, self.num_steps = vocab_size, computes, num_steps
        self._sampler = Sampler()
        self._extra = DeviceSteps(device, table, state.tokens_NL, vocab_size, dtype, num_steps=num_steps)
        self._steps: deque[_Launched] = deque()
        self._free = [_Buffers(device.event(), device.pinned(max(sizes.max_rows, sizes.max_seqs), "int32")) for _ in range(num_steps + 1)]

    overlaps_late = True

    @property
    def draws_ahead(self) -> DrawsAhead | None:
        """Not with plug-ins, which may want any row on the host."""
        return None if self.table.has_processors else "is_drawn_on_device"

    @property
    def max_rows(self) -> int:
        return self.sizes.max_rows

    @property
    def mode(self) -> tuple[str, str]:
        """("graphs" | "op by op", why)."""
        return self._forward.name, self._forward.why

    def forward(self, plan: StepPlan) -> None:
        """Starts the plan; nothing is waited for."""
        started = time.perf_counter()
        with self._device.running(), memory_errors("a step", "lower --max-num-batched-tokens or --gpu-memory-utilization"):
            self.table.apply(plan)
            self._state.changes.take(plan, self.table)
            self._extra.admit(plan)
            if plan.copies:
                self._store.copy(plan.copies)
            launched = _Launched(plan.step, started=started)
            self._steps.append(launched)
            if plan.scheduled:
                self._launch(plan, launched)

    def _launch(self, plan: StepPlan, launched: _Launched) -> None:
        rows = launched.rows = self._rows(plan)
        num_seqs, num_rows = len(rows.slots_S), len(rows.slot_R)
        size = self._forward.graph_for(num_seqs) if rows.is_decode else 0
        counts = self._state.send(
            (rows.slots_S, rows.starts_S, rows.first_S1), (rows.token_R, rows.slot_R, rows.place_R), size
        )  # fmt: skip
        buffers = launched.buffers = self._free.pop()
        if self._computes:
            logits_RV = self._forward.replay(size) if size else self._forward.run(rows.num_tokens, num_seqs, num_rows)
            if num_rows:
                logits_RV = logits_RV[:num_rows]
                self._draw(rows, launched, buffers, logits_RV, counts)
        buffers.event.record()
        self.table.expect_tokens(rows.slots_S[rows.early_S])

    def _draw(self, rows: _Rows, launched: _Launched, buffers: _Buffers, logits_RV: Array, counts: Counts) -> None:
        num_rows, last_S = len(rows.slot_R), rows.row_start_S1[1:] - 1
        ids_R = ops.sample(logits_RV, *(x[:num_rows] for x in self._state.inputs.draw))
        if len(chosen := rows.stepped_S):
            words = self._extra.num_words(rows.slots_S[chosen])
            if buffers.words is None or buffers.words.host.size < words:
                buffers.words = self._device.pinned(max(1024, 1 << words.bit_length()), "int32")
            launched.drawn = self._extra.draw(
                logits_RV, ids_R, chosen, last_S[chosen], rows.slots_S[chosen], rows.ends_S[chosen], buffers.words
            )  # fmt: skip
        self._state.commit(counts, ids_R)
        self._device.copy(buffers.ids.tensor[:num_rows], ids_R)
        if len(chosen := rows.kept_S):
            self._extra.keep(logits_RV, last_S[chosen], rows.slots_S[chosen])
        self._copy_late(rows, launched, logits_RV)

    def _copy_late(self, rows: _Rows, launched: _Launched, logits_RV: Array) -> None:
        """The logits of late sequences, run after run of rows, as float32."""
        buffers = launched.buffers
        if not len(rows.late_S) or buffers is None:
            return
        parts = [np.arange(rows.row_start_S1[s], rows.row_start_S1[s + 1]) for s in rows.late_S]
        late = launched.late_rows = np.concatenate(parts)
        if buffers.logits is None or len(buffers.logits.host) < len(late):
            buffers.logits = self._device.pinned((len(late), self._vocab_size), "float32")
        cuts = np.flatnonzero(np.diff(late) != 1) + 1
        at = 0
        for run in np.split(late, cuts):
            self._device.copy(buffers.logits.tensor[at : at + len(run)], logits_RV[int(run[0]) : int(run[-1]) + 1])
            at += len(run)

    def _rows(self, plan: StepPlan) -> _Rows:
        table, scheduled = self.table, plan.scheduled
        n = len(scheduled)
        slots_S = np.array([row.slot for row in scheduled], np.int32)
        starts_S = np.array([row.num_computed for row in scheduled], np.int32)
        planned_S = np.array([row.num_planned for row in scheduled], np.int32)
        ends_S = starts_S + planned_S
        first_S1 = np.zeros(n + 1, np.int32)
        np.cumsum(planned_S, out=first_S1[1:])
        num_tokens = int(first_S1[-1])
        assert num_tokens <= self.sizes.max_tokens and n <= self.sizes.max_seqs, "the plan passes the step's limits"
        is_sampled_S = ends_S == table.num_tokens_N[slots_S]
        kind_S = self._extra.kind_N[slots_S]
        scored_S = table.wants_prompt_logprobs_N[slots_S]
        if scored_S.any():
            scored_S &= [row.num_computed < table.info(row.slot).num_prompt_tokens for row in scheduled]
            kind_S[scored_S] = Kind.HOST
        is_early_S = is_sampled_S & (kind_S <= Kind.STEPS)
        early_S, stepped_S = np.flatnonzero(is_early_S), np.flatnonzero(is_early_S & (kind_S == Kind.STEPS))
        kept_S = np.flatnonzero(is_sampled_S & (kind_S == Kind.GUIDED))
        late_S = np.flatnonzero((is_sampled_S & (kind_S == Kind.HOST)) | scored_S)
        place_S = np.where(is_early_S, ends_S, ~ends_S)
        is_decode = num_tokens == n and not scored_S.any()
        if is_decode:
            row_start_S1 = np.arange(n + 1, dtype=np.int32)
            token_R, slot_R, place_R = row_start_S1[:-1], slots_S, place_S
        else:
            count_S = np.where(scored_S, planned_S, is_sampled_S.astype(np.int32))
            row_start_S1 = np.zeros(n + 1, np.int32)
            np.cumsum(count_S, out=row_start_S1[1:])
            inside = np.arange(row_start_S1[-1], dtype=np.int32) - np.repeat(row_start_S1[:-1], count_S)
            token_R = np.repeat(first_S1[1:] - count_S, count_S) + inside
            slot_R, place_R = np.repeat(slots_S, count_S), np.repeat(place_S, count_S)
        assert len(slot_R) <= max(self.sizes.max_rows, self.sizes.max_seqs), "the plan asks for more logits rows than there is room for"
        return _Rows(
            num_tokens, slots_S, starts_S, first_S1, ends_S, row_start_S1, early_S, stepped_S, kept_S, late_S, is_sampled_S, token_R, slot_R,
            place_R, is_decode,
        )  # fmt: skip

    # ---- the late half

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        """Waits for the oldest step, and draws its late rows."""
        launched = self._steps.popleft()
        assert launched.step == step, f"step {step} is not the oldest in flight"
        rows, buffers = launched.rows, launched.buffers
        if rows is None or buffers is None:
            return StepResult(step=step)
        try:
            return self._settle(launched, rows, buffers, masks)
        finally:
            self._free.append(buffers)

    def _settle(self, launched: _Launched, rows: _Rows, buffers: _Buffers, masks: Masks | None) -> StepResult:
        buffers.event.wait()
        started = time.perf_counter()
        results = [StepRow(slot=slot) for slot in rows.slots_S.tolist()]
        early = rows.early_S
        if len(early):
            ids = buffers.ids.host[rows.row_start_S1[early + 1] - 1]
            self.table.put_tokens(rows.slots_S[early], rows.ends_S[early], ids)
            for s, token in zip(early.tolist(), ids.tolist(), strict=True):
                if token >= 0:
                    results[s].token_ids = [token]
                else:
                    results[s].error = NOT_FINITE
        for s, entry in launched.drawn.logprobs() if launched.drawn is not None else ():
            if results[s].error is None:
                results[s].logprobs = [entry]
        if len(rows.kept_S):
            self._sample_kept(rows, masks, results)
        if len(rows.late_S) and buffers.logits is not None:
            self._sample_late(rows, buffers.logits.host[: len(launched.late_rows)], masks, results)
        seconds = time.perf_counter() - started
        return StepResult(step=launched.step, rows=results, forward_seconds=started - launched.started, sample_seconds=seconds)

    def _sample_kept(self, rows: _Rows, masks: Masks | None, results: list[StepRow]) -> None:
        """Beside the next forward, on the device."""
        slots, places = rows.slots_S[rows.kept_S], rows.ends_S[rows.kept_S]
        ids = self._extra.draw_kept(slots, places, masks)
        good = ids >= 0
        self.table.append_tokens(slots[good], ids[good])
        for s, slot, place, token in zip(rows.kept_S.tolist(), slots.tolist(), places.tolist(), ids.tolist(), strict=True):
            if token >= 0:
                results[s].token_ids = [token]
                self._state.changes.drawn(slot, place, token)
            else:
                results[s].error = NOT_FINITE

    def _sample_late(self, rows: _Rows, logits_RV: np.ndarray, masks: Masks | None, results: list[StepRow]) -> None:
        """On the host, by the sampler of a CPU, which appends to the table."""
        late = rows.late_S
        count_S = np.diff(rows.row_start_S1)[late]
        row_start_S1 = np.zeros(len(late) + 1, np.int32)
        np.cumsum(count_S, out=row_start_S1[1:])
        slots_S, is_sampled_S = rows.slots_S[late], rows.is_sampled_S[late]
        before = self.table.num_tokens_N[slots_S]
        view = StepRows(
            num_tokens=int(row_start_S1[-1]), num_seqs=len(late), num_rows=int(row_start_S1[-1]), num_sampled=int(is_sampled_S.sum()),
            slots_S=slots_S, row_start_S1=row_start_S1, is_sampled_S=is_sampled_S, first_position_S=rows.ends_S[late] - count_S,
        )  # fmt: skip
        for s, row, position in zip(late.tolist(), self._sampler.sample(logits_RV, view, self.table, masks), before.tolist(), strict=True):
            results[s] = row
            if row.token_ids:
                self._state.changes.drawn(row.slot, position, row.token_ids[0])

    def abandon(self) -> None:
        """Forgets every step in flight, because one failed."""
        self._state.changes.failed()
        self._device.synchronize()
        for launched in self._steps:
            if launched.buffers is not None:
                self._free.append(launched.buffers)
        self._steps.clear()
