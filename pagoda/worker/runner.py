"""The runner: a plan in, a result out. Composes table, batch, forward and sampler; knows nothing they know.

    forward(N)     inputs written | forward started
    forward(N+1)   the same, behind it, while N runs: its inputs are tokens that N draws, which nobody has seen yet
    sample(N)      waits for N, and takes what it drew

A step whose rows are all decided by the draw at the end of the forward can be followed like this. One that also has rows to be
drawn from their logits is late: it is the last one started until it has been sampled.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from pagoda.base.plan import NOT_FINITE, Masks, StepPlan, StepResult, StepRow
from pagoda.base.types import DrawsAhead
from pagoda.worker.batch import BatchBuilder, StepRows
from pagoda.worker.graphs import Drawn, Forward
from pagoda.worker.kv_store import KvStore
from pagoda.worker.sampler import Sampler
from pagoda.worker.table import RequestTable

__all__ = ["Runner"]


@dataclass
class _Launched:
    """A step between its two halves. `sampled_I`: the sequences whose next token it draws, and where in the table these go; None: late."""

    step: int
    rows: StepRows | None = None
    sampled_I: np.ndarray | None = None
    places_I: np.ndarray | None = None
    drawn: Drawn | None = None


class Runner:
    overlaps_late = False

    def __init__(self, table: RequestTable, builder: BatchBuilder, forward: Forward, store: KvStore) -> None:
        self.table, self.builder, self._forward, self._store = table, builder, forward, store
        self.num_steps = forward.num_steps
        self._sampler = Sampler()
        self._steps: deque[_Launched] = deque()
        self._row_N = np.full(len(table.infos), -1, np.int32)  # by slot: the row of the last step that draws its token

    @property
    def draws_ahead(self) -> DrawsAhead | None:
        """Not with plug-ins, which may want any row's logits."""
        return None if self.table.has_processors else "is_drawn_by_forward"

    @property
    def max_rows(self) -> int:
        return self.builder.sizes.max_rows

    @property
    def mode(self) -> tuple[str, str]:
        """("recorded" | "op by op", why)."""
        return self._forward.name, self._forward.why

    def forward(self, plan: StepPlan) -> None:
        """Starts the plan; nothing is waited for unless steps come one after the other."""
        assert len(self._steps) < self.num_steps, "the last step has not been sampled"
        self.table.apply(plan)
        if plan.copies:
            for before in self._steps:
                before.drawn = before.drawn or self._forward.join()
            self._store.copy(plan.copies)
        launched = _Launched(plan.step)
        if plan.scheduled:
            self._launch(plan, launched)
        self._steps.append(launched)

    def _launch(self, plan: StepPlan, launched: _Launched) -> None:
        assert not any(before.rows is not None and before.sampled_I is None for before in self._steps), "a step was planned behind a late one"
        rows = launched.rows = self.builder.build(plan, self.table)
        self.builder.follow(rows, self._row_N if self._steps else None)
        is_late = self._is_late(rows)
        self._forward.start(rows, alone=self.num_steps == 1 or (is_late and not self._steps))
        self._row_N.fill(-1)
        if not is_late:
            launched.sampled_I = np.arange(rows.num_seqs) if rows.is_plain else np.flatnonzero(rows.is_sampled_S)
            slots_I = rows.slots_S[launched.sampled_I]
            launched.places_I = self.table.expect_tokens(slots_I)
            self._row_N[slots_I] = rows.row_start_S1[launched.sampled_I + 1] - 1

    def _is_late(self, rows: StepRows) -> bool:
        if rows.is_plain:
            return False
        return rows.num_rows > rows.num_sampled or bool(self.table.is_redrawn_N[rows.slots_S[rows.is_sampled_S]].any())

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        """The late half of the oldest step: its tokens."""
        launched = self._steps.popleft() if self._steps else None
        assert launched is not None and launched.step == step, f"step {step} was not run"
        rows = launched.rows
        if rows is None:
            return StepResult(step=step)
        drawn = launched.drawn or self._forward.join()
        started = time.perf_counter()
        if launched.sampled_I is None or launched.places_I is None:
            found = self._sampler.sample(drawn.logits_RV, rows, self.table, masks, drawn.ids_R)
        else:
            found = self._take(rows, launched.sampled_I, launched.places_I, drawn.ids_R)
        return StepResult(step=step, rows=found, forward_seconds=drawn.seconds, sample_seconds=time.perf_counter() - started)

    def _take(self, rows: StepRows, sampled_I: np.ndarray, places_I: np.ndarray, ids_R: np.ndarray) -> list[StepRow]:
        """The tokens that the forward drew."""
        ids_I = ids_R if rows.is_plain else ids_R[rows.row_start_S1[sampled_I + 1] - 1]
        self.table.put_tokens(rows.slots_S[sampled_I], places_I, ids_I)
        if rows.is_plain and ids_I.min(initial=0) >= 0:
            return [StepRow(slot=slot, token_ids=[token]) for slot, token in zip(rows.slots_S.tolist(), ids_I.tolist(), strict=True)]
        found = [StepRow(slot=slot) for slot in rows.slots_S.tolist()]
        for s, token in zip(sampled_I.tolist(), ids_I.tolist(), strict=True):
            if token >= 0:
                found[s].token_ids = [token]
            else:
                found[s].error = NOT_FINITE
        return found

    def abandon(self) -> None:
        """Forgets every step in flight, because one failed, so that the next plan can run."""
        for launched in self._steps:
            if launched.rows is not None and launched.drawn is None:
                with suppress(Exception):  # it was told already, or nobody asks for this step any more
                    self._forward.join()
        self._steps.clear()
