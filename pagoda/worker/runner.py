"""The runner: a plan in, a result out. Composes table, batch, forward and sampler; knows nothing they know."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from pagoda.base.plan import Masks, StepPlan, StepResult
from pagoda.worker.batch import BatchBuilder, StepRows
from pagoda.worker.graphs import Forward
from pagoda.worker.kv_store import KvStore
from pagoda.worker.sampler import Sampler
from pagoda.worker.table import RequestTable

__all__ = ["Runner"]


@dataclass(frozen=True)
class _Launched:
    """A step between its two halves."""

    step: int
    rows: StepRows | None = None
    logits_RV: np.ndarray | None = None
    drawn_R: np.ndarray | None = None
    seconds: float = 0.0


class Runner:
    def __init__(self, table: RequestTable, builder: BatchBuilder, forward: Forward, store: KvStore) -> None:
        self.table, self.builder, self._forward, self._store = table, builder, forward, store
        self._sampler = Sampler()
        self._step: _Launched | None = None

    num_steps = 1
    plans_ahead = False

    @property
    def max_rows(self) -> int:
        return self.builder.sizes.max_rows

    @property
    def mode(self) -> tuple[str, str]:
        """("recorded" | "op by op", why)."""
        return self._forward.name, self._forward.why

    def forward(self, plan: StepPlan) -> None:
        """Runs the plan up to its logits."""
        assert self._step is None, "the last step has not been sampled"
        started = time.perf_counter()
        self.table.apply(plan)
        if plan.copies:
            self._store.copy(plan.copies)
        if not plan.scheduled:
            self._step = _Launched(plan.step)
            return
        rows = self.builder.build(plan, self.table)
        logits_RV, drawn_R = self._forward.run(rows)
        self._step = _Launched(plan.step, rows, logits_RV, drawn_R, time.perf_counter() - started)

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        """The late half: draws the tokens of the step that `forward` ran."""
        launched, self._step = self._step, None
        assert launched is not None and launched.step == step, f"step {step} was not run"
        if launched.rows is None or launched.logits_RV is None:
            return StepResult(step=step)
        started = time.perf_counter()
        found = self._sampler.sample(launched.logits_RV, launched.rows, self.table, masks, launched.drawn_R)
        seconds = time.perf_counter() - started
        return StepResult(step=step, rows=found, forward_seconds=launched.seconds, sample_seconds=seconds)

    def abandon(self) -> None:
        """Forgets a step whose forward failed, so that the next plan can run."""
        self._step = None
