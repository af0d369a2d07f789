"""The runner: a plan in, a result out. Composes table, batch, forward and sampler; knows nothing they know."""

from __future__ import annotations

import time

import numpy as np

from pagoda.base.plan import Masks, StepPlan, StepResult
from pagoda.worker.batch import BatchBuilder, StepRows
from pagoda.worker.graphs import Forward
from pagoda.worker.kv_store import KvStore
from pagoda.worker.sampler import Sampler
from pagoda.worker.table import RequestTable

__all__ = ["Runner"]


class Runner:
    def __init__(self, table: RequestTable, builder: BatchBuilder, forward: Forward, store: KvStore) -> None:
        self.table, self.builder, self._forward, self._store = table, builder, forward, store
        self._sampler = Sampler()
        self._step: tuple[int, StepRows | None, np.ndarray | None, float] | None = None

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
            self._step = (plan.step, None, None, 0.0)
            return
        rows = self.builder.build(plan, self.table)
        logits_RV = self._forward.run(rows)
        self._step = (plan.step, rows, logits_RV, time.perf_counter() - started)

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        """The late half: draws the tokens of the step that `forward` ran."""
        assert self._step is not None and self._step[0] == step, f"step {step} was not run"
        (_, rows, logits_RV, seconds), self._step = self._step, None
        if rows is None or logits_RV is None:
            return StepResult(step=step)
        started = time.perf_counter()
        found = self._sampler.sample(logits_RV, rows, self.table, masks)
        return StepResult(step=step, rows=found, forward_seconds=seconds, sample_seconds=time.perf_counter() - started)

    def abandon(self) -> None:
        """Forgets a step whose forward failed, so that the next plan can run."""
        self._step = None
