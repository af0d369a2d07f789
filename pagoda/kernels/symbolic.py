"""Arrays that exist when a program runs, the steps recorded with them, and what memory a step reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pagoda.kernels.table import CannotRecord
from pagoda.kernels.weight import Weight

if TYPE_CHECKING:
    from pagoda.kernels.record import Recorder

__all__ = ["Access", "Slot", "Step", "SymArray", "access"]

# Operands an op writes; every other op writes its last one.
_WRITES = {"kv_write": (2, 3), "linear": (4,)}
_USES_SCRATCH = {"linear", "attention", "sample"}  # of which two must not overlap


@dataclass(eq=False)
class Slot:
    """Memory behind SymArrays: an outside array, or a part of the arena that lives for some groups."""

    row_nbytes: int
    outside: np.ndarray | None = None
    nbytes: int = 0
    offset: int = 0
    first_group: int = -1
    last_group: int = -1


@dataclass(frozen=True, eq=False)
class SymArray:
    """An array that exists when the program runs. `shape` is (rows symbol, cols), or (rows symbol,) in one dimension."""

    recorder: Recorder
    slot: Slot
    shape: tuple[Any, ...]
    dtype: np.dtype[Any]
    first_col: int = 0
    kernel_device: str = field(default="record", init=False)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: Any) -> SymArray:
        """A column slice `x[:, a:b]`; nothing else can be had before the program runs."""
        if not (self.ndim == 2 and isinstance(key, tuple) and len(key) == 2 and key[0] == slice(None)):
            raise CannotRecord("slice", "only column slices `x[:, a:b]` of two-dimensional arrays can be taken")
        if not isinstance(key[1], slice):
            raise CannotRecord("slice", "a single column is not an array of rows")
        start, stop, step = key[1].indices(self.shape[1])
        if step != 1 or stop <= start:
            raise CannotRecord("slice", f"columns {start}:{stop}:{step} are not a contiguous, non-empty range")
        return SymArray(self.recorder, self.slot, (self.shape[0], stop - start), self.dtype, self.first_col + start)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise CannotRecord("numpy", "a recorded array has no values before the program runs")


@dataclass(frozen=True)
class Access:
    """Columns [start, stop) of some memory, for finding out which instructions depend on each other."""

    memory: int
    start: int
    stop: int

    def overlaps(self, other: Access) -> bool:
        return self.memory == other.memory and self.start < other.stop and other.start < self.stop


@dataclass(frozen=True, eq=False)
class Step:
    """One op as it was called."""

    op: str
    operands: Sequence[Any]
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()

    @property
    def written(self) -> tuple[int, ...]:
        """Which operands it writes."""
        if self.op == "attention" and len(self.operands) > 7:
            return (1, 2, 6)  # it brings new keys and values
        return _WRITES.get(self.op, (len(self.operands) - 1,)) if self.operands else ()

    def accesses(self) -> tuple[list[Access], list[Access]]:
        """-> (what it reads, what it writes). The pages that a product asks for it does not read."""
        operands = self.operands[:6] if self.op == "linear" else self.operands
        reads = [access(x) for k, x in enumerate(operands) if x is not None and k not in self.written]
        writes = [access(self.operands[k]) for k in self.written]
        return reads, writes + ([Access(0, 0, 1)] if self.op in _USES_SCRATCH else [])


def access(operand: Any) -> Access:
    if isinstance(operand, SymArray):
        stop = operand.first_col + (1 if operand.ndim == 1 else operand.shape[1])
        if operand.slot.outside is not None:
            return _whole(operand.slot.outside)
        return Access(id(operand.slot), operand.first_col, stop)
    return _whole(operand.data if isinstance(operand, Weight) else operand)


def _whole(array: np.ndarray) -> Access:
    """All of the memory an array is a view of: two views of one array are taken to overlap."""
    root: Any = array
    while isinstance(root, np.ndarray) and isinstance(root.base, np.ndarray):
        root = root.base
    return Access(id(root), 0, 1)
