"""Record the forward once, replay it every step; or run it op by op where that cannot be done, and say so.

The forward ends with the fused draw of every logits row. Its ids are the step's tokens unless a row needs more than that
(`worker/sampler.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pagoda.base.log import get_logger
from pagoda.kernels import ops
from pagoda.kernels.record import CannotRecord, Recorder
from pagoda.layers.batch import Batch, GroupBatch
from pagoda.models.decoder import Model
from pagoda.worker.batch import BatchBuilder, Sizes, StepRows
from pagoda.worker.kv_store import KvStore

__all__ = ["Drawn", "Forward", "OpByOp", "Recorded", "make_forward"]

log = get_logger(__name__)


@dataclass(frozen=True)
class Drawn:
    """What a forward gave. The logits are valid until the next one is started; `seconds` is what it took."""

    logits_RV: np.ndarray
    ids_R: np.ndarray
    seconds: float


class Forward(Protocol):
    """One forward pass from the builder's arrays, in two halves."""

    name: str
    why: str
    num_steps: int
    """How many may be between their halves."""

    def start(self, rows: StepRows, *, alone: bool) -> None:
        """The builder's arrays may change as soon as it returns. `alone`: none will be started before this one is joined."""

    def join(self) -> Drawn:
        """Waits for the oldest that was started."""

    @property
    def nbytes(self) -> int: ...

    @property
    def seconds(self) -> float:
        """What all forwards so far took."""


class Recorded:
    """The whole forward as one native program: one call per step, or two where the next step is prepared meanwhile."""

    name = "recorded"
    why = "one native program per forward"

    def __init__(self, model: Model, builder: BatchBuilder, store: KvStore, sizes: Sizes, *, num_steps: int) -> None:
        self.num_steps = num_steps
        recorder = Recorder(max_rows={"T": sizes.max_tokens, "S": sizes.max_seqs, "R": sizes.max_rows})
        batch = _symbolic(recorder, builder.whole(store))
        logits_RV = model.logits(model.forward(batch))
        ids_R = ops.sample(logits_RV, *(recorder.feed(array, "R") for array in builder.draw.arrays()))
        recorder.follow(batch.token_ids_T, recorder.feed(builder.source_T, "T"), ids_R)
        self.program = recorder.finish(outputs=[logits_RV, ids_R])
        self._alone: Drawn | None = None

    def start(self, rows: StepRows, *, alone: bool) -> None:
        sizes = {"T": rows.num_tokens, "S": rows.num_seqs, "R": rows.num_rows}
        if not alone:
            self.program.start(**sizes)
            return
        before = self.program.seconds
        self.program.run(**sizes)
        self._alone = Drawn(self.program.output(0), self.program.output(1), self.program.seconds - before)

    def join(self) -> Drawn:
        if self._alone is not None:
            drawn, self._alone = self._alone, None
            return drawn
        ids_R, seconds = self.program.join()
        return Drawn(self.program.output(0), ids_R, seconds)

    @property
    def nbytes(self) -> int:
        return self.program.arena_nbytes

    @property
    def seconds(self) -> float:
        return self.program.seconds


def _symbolic(recorder: Recorder, batch: Batch) -> Batch:
    """The batch with its arrays wrapped as inputs of the program."""
    return replace(
        batch,
        token_ids_T=recorder.feed(batch.token_ids_T, "T"),
        positions_T=recorder.feed(batch.positions_T, "T"),
        query_start_S1=recorder.feed(batch.query_start_S1, "S", more=1),
        seq_lens_S=recorder.feed(batch.seq_lens_S, "S"),
        logits_idx_R=recorder.feed(batch.logits_idx_R, "R"),
        groups=tuple(GroupBatch(recorder.feed(g.block_table_SB, "S"), recorder.feed(g.slots_T, "T")) for g in batch.groups),
    )


@dataclass
class OpByOp:
    """The model called from Python, every op a native (or reference) call of its own."""

    model: Model
    builder: BatchBuilder
    store: KvStore
    why: str
    name: str = "op by op"
    nbytes: int = 0
    num_steps: int = 1
    seconds: float = 0.0
    _drawn: Drawn | None = None

    def start(self, rows: StepRows, *, alone: bool) -> None:
        assert alone, "op by op there is one step at a time"
        started = time.perf_counter()
        logits_RV, ids_R = self._run(rows)
        self._drawn = Drawn(logits_RV, ids_R, time.perf_counter() - started)
        self.seconds += self._drawn.seconds

    def join(self) -> Drawn:
        drawn, self._drawn = self._drawn, None
        assert drawn is not None
        return drawn

    def _run(self, rows: StepRows) -> tuple[np.ndarray, np.ndarray]:
        batch = self.builder.view(rows, self.store)
        hidden_RD = self.model.forward(batch)
        if rows.num_rows == 0:
            return np.empty((0, 0), np.float32), np.empty(0, np.int32)
        logits_RV = self.model.logits(hidden_RD)
        return logits_RV, ops.sample(logits_RV, *(array[: rows.num_rows] for array in self.builder.draw.arrays()))


def make_forward(model: Model, builder: BatchBuilder, store: KvStore, *, eager: bool, native: bool, num_steps: int = 1) -> Forward:
    """Recorded where the kernels can, unless `eager` was asked for. `num_steps` may then be between their halves."""
    if eager:
        return OpByOp(model, builder, store, why="--enforce-eager")
    if not native:
        return OpByOp(model, builder, store, why="the native library is not there, or PAGODA_KERNELS=reference")
    try:
        return Recorded(model, builder, store, builder.sizes, num_steps=num_steps)
    except CannotRecord as error:
        log.warning("running op by op: %s", error)
        return OpByOp(model, builder, store, why=str(error))
