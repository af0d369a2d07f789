"""Record the forward once, replay it every step; or run it op by op where that cannot be done, and say so.

The forward ends with the fused draw of every logits row. Its ids are the step's tokens unless a row needs more than that
(`worker/sampler.py`).
"""

from __future__ import annotations

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

__all__ = ["Forward", "OpByOp", "Recorded", "make_forward"]

log = get_logger(__name__)


class Forward(Protocol):
    """One forward pass: from the builder's arrays to (logits_RV, drawn ids_R), valid until the next run."""

    name: str
    why: str

    def run(self, rows: StepRows) -> tuple[np.ndarray, np.ndarray]: ...

    @property
    def nbytes(self) -> int: ...


class Recorded:
    """The whole forward as one native program: one call per step."""

    name = "recorded"
    why = "one native program per forward"

    def __init__(self, model: Model, builder: BatchBuilder, store: KvStore, sizes: Sizes) -> None:
        recorder = Recorder(max_rows={"T": sizes.max_tokens, "S": sizes.max_seqs, "R": sizes.max_rows})
        batch = _symbolic(recorder, builder.whole(store))
        logits_RV = model.logits(model.forward(batch), batch)
        ids_R = ops.sample(logits_RV, *(recorder.input(array, rows="R") for array in builder.draw.arrays()))
        self.program = recorder.finish(outputs=[logits_RV, ids_R])

    def run(self, rows: StepRows) -> tuple[np.ndarray, np.ndarray]:
        self.program.run(T=rows.num_tokens, S=rows.num_seqs, R=rows.num_rows)
        return self.program.output(0), self.program.output(1)

    @property
    def nbytes(self) -> int:
        return self.program.arena_nbytes


def _symbolic(recorder: Recorder, batch: Batch) -> Batch:
    """The batch with its arrays wrapped as inputs of the program."""
    return replace(
        batch,
        token_ids_T=recorder.input(batch.token_ids_T, rows="T"),
        positions_T=recorder.input(batch.positions_T, rows="T"),
        query_start_S1=recorder.input(batch.query_start_S1, rows="S"),
        seq_lens_S=recorder.input(batch.seq_lens_S, rows="S"),
        logits_idx_R=recorder.input(batch.logits_idx_R, rows="R"),
        groups=tuple(
            GroupBatch(recorder.input(g.block_table_SB, rows="S"), recorder.input(g.slots_T, rows="T")) for g in batch.groups
        ),
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

    def run(self, rows: StepRows) -> tuple[np.ndarray, np.ndarray]:
        batch = self.builder.view(rows, self.store)
        hidden_TD = self.model.forward(batch)
        if rows.num_rows == 0:
            return np.empty((0, 0), np.float32), np.empty(0, np.int32)
        logits_RV = self.model.logits(hidden_TD, batch)
        return logits_RV, ops.sample(logits_RV, *(array[: rows.num_rows] for array in self.builder.draw.arrays()))


def make_forward(model: Model, builder: BatchBuilder, store: KvStore, *, eager: bool, native: bool) -> Forward:
    """Recorded where the kernels can, unless `eager` was asked for."""
    if eager:
        return OpByOp(model, builder, store, why="--enforce-eager")
    if not native:
        return OpByOp(model, builder, store, why="the native library is not there, or PAGODA_KERNELS=reference")
    try:
        return Recorded(model, builder, store, builder.sizes)
    except CannotRecord as error:
        log.warning("running op by op: %s", error)
        return OpByOp(model, builder, store, why=str(error))
