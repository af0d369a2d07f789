"""Record once, replay every step: a forward written against `ops` becomes one native program.

    recorder = Recorder(max_rows={"T": 512, "S": 64, "R": 64})
    ids_T = recorder.input(ids, rows="T")            # persistent numpy array, filled before each run
    x_TD = ops.embedding(ids_T, table)               # returns a SymArray; nothing is computed
    ...
    program = recorder.finish(outputs=[logits_RV])
    program.run(T=37, S=5, R=5)                      # one native call
    program.output(0)                                # view, valid until the next run

Where inputs are fed instead, a run comes in two halves, `start` and `join`, and the next one can be prepared, and started, while one
is under way.

The number of rows of an array is a symbol: T tokens, S sequences, R logit rows. Arrays made while recording live in
one arena, in slots sized for the most rows there can be and reused as soon as nothing reads them any more:

    instruction   0   1 | 2 | 3   4 | 5        | = all threads meet (a barrier)
    slot A        w   r |   |       |          instructions between two barriers touch different data and may
    slot B            w | r |       |          overlap in time, so a slot is given away only after the barrier
    slot C              | w | r   r | r        that follows its last reader

numpy arrays, weights and cache planes given to an op while recording are captured by address and kept alive. Some steps are
joined into one before any memory is given out (fuse.py).
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagoda.kernels.cpu import library
from pagoda.kernels.cpu.library import SYMBOLS, Instruction, KernelFault, Library, Tensor
from pagoda.kernels.fuse import fuse
from pagoda.kernels.memory import ALIGNMENT, allocate
from pagoda.kernels.symbolic import Access, Slot, Step, SymArray
from pagoda.kernels.table import CannotRecord

__all__ = ["Program", "Recorder", "SymArray"]


@dataclass
class _Patch:
    """An operand whose address is known only when the arena is laid out."""

    instruction: Instruction
    operand: int
    slot: Slot
    byte_offset: int


class Recorder:
    """Collects instructions. `max_rows` gives the most rows of each symbol, which the program can never exceed."""

    def __init__(self, *, max_rows: dict[str, int], lib: Library | None = None) -> None:
        unknown = set(max_rows) - set(SYMBOLS)
        assert not unknown, f"unknown row symbols {unknown}"
        self.max_rows = dict(max_rows)
        self._library = lib or library.default()
        self._code: list[Instruction] = []
        self._patches: list[_Patch] = []
        self._slots: list[Slot] = []
        self._steps: list[Step] = []
        self._group = 0
        self._group_reads: list[Access] = []
        self._group_writes: list[Access] = []
        self._num_marks = 0
        self._feeds: list[tuple[np.ndarray, np.ndarray, str, int]] = []
        self._follow: tuple[SymArray, SymArray, SymArray] | None = None

    def input(self, array: np.ndarray, rows: str) -> SymArray:
        """A persistent array, read (or written) in place by every run; it has room for the most rows of the symbol."""
        if array.shape[0] < self.max_rows[rows]:
            raise ValueError(f"an input of {array.shape[0]} rows cannot hold the {self.max_rows[rows]} rows of `{rows}`")
        library.describe(array)  # refuses what no kernel can read
        shape = (rows,) if array.ndim == 1 else (rows, array.shape[1])
        return SymArray(self, Slot(array.strides[0], outside=array), shape, array.dtype)

    def feed(self, staged: np.ndarray, rows: str, more: int = 0) -> SymArray:
        """An input that each run takes from `staged` when it is asked for, so that the next one can be prepared meanwhile: as many
        rows as the symbol says, and `more`."""
        assert staged.flags.c_contiguous
        live = np.zeros_like(staged)
        self._feeds.append((live, staged, rows, more))
        return self.input(live, rows)

    def follow(self, tokens_T: SymArray, source_T: SymArray, drawn_R: SymArray) -> None:
        """Before each run tokens_T[i] becomes drawn_R[source_T[i]] wherever source_T[i] >= 0: what the run before drew. `drawn_R` is an
        output, the others are fed."""
        self._follow = (tokens_T, source_T, drawn_R)

    def temporary(self, rows: str, cols: int | None, dtype: np.dtype[Any]) -> SymArray:
        """An uninitialised array in the arena."""
        row_nbytes = (cols or 1) * dtype.itemsize
        size = -(-max(self.max_rows[rows], 1) * row_nbytes // ALIGNMENT) * ALIGNMENT
        slot = Slot(row_nbytes, nbytes=size)
        self._slots.append(slot)
        return SymArray(self, slot, (rows,) if cols is None else (rows, cols), dtype)

    def mark(self) -> int:
        """A layer boundary: when a run passes it, its progress grows by one. Returns the mark's number, from 1."""
        self._steps.append(Step("mark", ()))
        self._num_marks += 1
        return self._num_marks

    def emit(self, op: str, operands: Sequence[Any], ints: Sequence[int], floats: Sequence[float]) -> None:
        """Appends one op. ValueError when its operands do not fit together."""
        if op not in self._library.ops:
            raise CannotRecord(op)
        step = Step(op, operands, ints, floats)
        self._instruction(step)  # checks
        self._steps.append(step)

    def _instruction(self, step: Step) -> Instruction:
        made = self._library.instruction(step.op, [self._tensor(x) for x in step.operands], step.ints, step.floats)
        made.barrier = 0
        return made

    def _place(self, step: Step) -> None:
        """Appends an instruction, and before it a barrier if it needs one."""
        instruction = self._instruction(step)
        if step.op == "mark":
            self._start_group()
        self._order(*step.accesses())
        for k, operand in enumerate(step.operands):
            if isinstance(operand, SymArray) and operand.slot.outside is None:
                self._use(operand, instruction, k)
        self._code.append(instruction)

    def finish(self, outputs: Sequence[SymArray]) -> Program:
        """Joins steps, lays out the arena and makes the program. Outputs keep their memory until the next run."""
        for step in fuse(self._steps, outputs):
            self._place(step)
        for output in outputs:
            output.slot.last_group = self._group + 1
        arena = allocate(_plan([slot for slot in self._slots if slot.first_group >= 0]))
        code = (Instruction * len(self._code))(*self._code)
        place = {id(instruction): k for k, instruction in enumerate(self._code)}
        for patch in self._patches:
            target = code[place[id(patch.instruction)]].t[patch.operand]
            target.data = arena.ctypes.data + patch.slot.offset + patch.byte_offset
        return Program(self._library, code, arena, list(outputs), self.max_rows, self._steps, self._feeds, self._follow)

    def _tensor(self, operand: Any) -> Tensor:
        if not isinstance(operand, SymArray):
            return library.describe(operand)
        assert operand.recorder is self, "an array of another recorder"
        slot, item = operand.slot, operand.dtype.itemsize
        rows = self.max_rows[operand.shape[0]]
        cols, stride = (1, 1) if operand.ndim == 1 else (operand.shape[1], slot.row_nbytes // item)
        # Until the arena is laid out an address stands in; only "is it given" is looked at before.
        address = slot.outside.ctypes.data + operand.first_col * item if slot.outside is not None else ALIGNMENT
        return Tensor(address, rows, cols, stride, library.DTYPES[operand.dtype], SYMBOLS[operand.shape[0]])

    def _use(self, array: SymArray, instruction: Instruction, operand: int) -> None:
        slot = array.slot
        slot.first_group = self._group if slot.first_group < 0 else slot.first_group
        slot.last_group = self._group
        self._patches.append(_Patch(instruction, operand, slot, array.first_col * array.dtype.itemsize))

    def _order(self, reads: list[Access], writes: list[Access]) -> None:
        """Puts a barrier before the next instruction when it depends on the group it would join."""
        clash = any(w.overlaps(x) for w in writes for x in (*self._group_reads, *self._group_writes))
        clash = clash or any(r.overlaps(x) for r in reads for x in self._group_writes)
        if clash:
            self._start_group()
        self._group_reads += reads
        self._group_writes += writes

    def _start_group(self) -> None:
        if self._code:
            self._code[-1].barrier = 1
        self._group += 1
        self._group_reads, self._group_writes = [], []


class Program:
    """A recorded forward. Runs happen one at a time, and the views of the last one end with the next."""

    def __init__(
        self,
        lib: Library,
        code: Any,
        arena: np.ndarray,
        outputs: list[SymArray],
        max_rows: dict[str, int],
        kept: list[Step],
        feeds: list[tuple[np.ndarray, np.ndarray, str, int]],
        follow: tuple[SymArray, SymArray, SymArray] | None,
    ) -> None:
        self._library, self._arena, self._kept, self._feeds = lib, arena, kept, feeds
        self._outputs = outputs
        self._max_rows = max_rows
        self._rows = dict.fromkeys(SYMBOLS, 0)
        self._whole = [self._whole_output(output) for output in outputs]
        self.num_instructions = len(code)
        self._op_names = [lib.ops[instruction.opcode] for instruction in code]
        self.num_barriers = sum(instruction.barrier for instruction in code)
        self.arena_nbytes = int(arena.nbytes)
        self._handle = lib.dll.pg_program_create(lib.handle, code, len(code))
        if not self._handle:
            raise KernelFault(lib.last_error())
        self._started: deque[dict[str, int]] = deque()
        for live, staged, rows, more in feeds:
            lib.dll.pg_program_feed(self._handle, live.ctypes.data, staged.ctypes.data, live.strides[0], SYMBOLS[rows], more)
        if follow is not None:
            lib.dll.pg_program_follow(self._handle, *(self._whole_output(x).ctypes.data for x in follow))

    def run(self, *, T: int = 0, S: int = 0, R: int = 0) -> None:
        """One native call. KernelFault when rows exceed what was recorded for or an operand holds something impossible."""
        self._library.num_calls += 1
        if self._library.dll.pg_program_run(self._handle, T, S, R):
            raise KernelFault(self._library.last_error())
        self._rows = {"T": T, "S": S, "R": R}

    def start(self, *, T: int = 0, S: int = 0, R: int = 0) -> None:
        """Asks for a run and returns; what is fed may change from now on. At most two are under way, one after the other."""
        self._library.num_calls += 1
        if self._library.dll.pg_program_start(self._handle, T, S, R):
            raise KernelFault(self._library.last_error())
        self._started.append({"T": T, "S": S, "R": R})

    def join(self) -> tuple[np.ndarray, float]:
        """Waits for the oldest run under way -> (what it drew, the seconds it took). Outputs are its own unless another has been started."""
        rows, nanoseconds = self._started.popleft(), ctypes.c_int64()
        drawn_R = np.empty(rows["R"], np.int32)
        if self._library.dll.pg_program_join(self._handle, drawn_R.ctypes.data, ctypes.byref(nanoseconds)):
            raise KernelFault(self._library.last_error())
        self._rows = rows
        return drawn_R, nanoseconds.value * 1e-9

    @property
    def seconds(self) -> float:
        """What all runs so far took."""
        return float(self._library.dll.pg_program_nanoseconds(self._handle)) * 1e-9

    def output(self, index: int) -> np.ndarray:
        """The rows of the latest run, a view into memory that the next run overwrites."""
        return self._whole[index][: self._rows[self._outputs[index].shape[0]]]

    def _whole_output(self, array: SymArray) -> np.ndarray:
        """All the rows there can be."""
        slot = array.slot
        if slot.outside is not None:
            whole = slot.outside
        else:
            end = slot.offset + self._max_rows[array.shape[0]] * slot.row_nbytes
            whole = self._arena[slot.offset : end].view(array.dtype)
            whole = whole if array.ndim == 1 else whole.reshape(-1, slot.row_nbytes // array.dtype.itemsize)
        return whole if array.ndim == 1 else whole[:, array.first_col : array.first_col + array.shape[1]]

    @property
    def progress(self) -> int:
        """Marks passed by the run under way, or by the latest one. May be read from any thread."""
        return int(self._library.dll.pg_program_progress(self._handle))

    def wait_mark(self, mark: int, timeout: float) -> bool:
        """Waits until a run has passed the mark; False after `timeout` seconds. For other threads than the runner's."""
        return bool(self._library.dll.pg_program_wait(self._handle, mark, int(timeout * 1e6)) >= mark)

    def trace(self, on: bool) -> None:
        """From the next run on, note when each stage begins; `stage_times` reads the notes."""
        self._library.dll.pg_program_trace(self._handle, int(on))

    def stage_times(self) -> list[tuple[str, float, float]]:
        """(op, start, duration) of every stage of the latest traced run, seconds of the monotonic clock.

        A stage is named after its first instruction; a linear with two phases has two.
        """
        most = 4 * self.num_instructions + 1
        nanoseconds, instructions = np.zeros(most, np.int64), np.zeros(most, np.int32)
        count = self._library.dll.pg_program_times(
            self._handle, nanoseconds.ctypes.data, instructions.ctypes.data, most
        )
        ends = nanoseconds[1:count]
        return [
            (self._op_names[instructions[k]], nanoseconds[k] * 1e-9, (ends[k] - nanoseconds[k]) * 1e-9)
            for k in range(count - 1)
        ]

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.dll.pg_program_free(self._handle)


def _plan(slots: list[Slot]) -> int:
    """Gives every slot an offset such that slots alive in the same group never overlap. -> bytes of the arena."""
    size, alive = 0, list[Slot]()
    for slot in sorted(slots, key=lambda s: s.first_group):
        alive = sorted((s for s in alive if s.last_group >= slot.first_group), key=lambda s: s.offset)
        offset = 0
        for other in alive:
            if offset + slot.nbytes <= other.offset:
                break
            offset = max(offset, other.offset + other.nbytes)
        slot.offset = offset
        alive.append(slot)
        size = max(size, offset + slot.nbytes)
    return size


assert ctypes.sizeof(Tensor) == 40
