"""The native library, bound through ctypes on raw pointers; the C side is declared in csrc/api.h.

`default()` is the library of this process: one pool of threads, one instruction set chosen from what the CPU can do.
Calls release the GIL while they run. One caller uses it at a time; a second one waits.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pagoda.base import env
from pagoda.kernels.weight import Weight

__all__ = ["Instruction", "KernelFault", "Library", "LibraryUnavailable", "Tensor", "default", "describe"]

PATH = Path(__file__).with_name("libpagoda.so")
_ABI = 3
_MAX_TENSORS, _MAX_INTS, _MAX_FLOATS = 12, 9, 2

DTYPES: dict[np.dtype[Any], int] = {
    np.dtype(np.float32): 0,
    np.dtype(ml_dtypes.bfloat16): 1,
    np.dtype(np.int32): 2,
    np.dtype(np.int64): 3,
    np.dtype(np.uint64): 4,
    np.dtype(np.uint8): 5,
    np.dtype(np.bool_): 5,
}
_BLOCK_FORMATS = {"q8_0": 18, "q4_0": 19, "q4_1": 20, "q4_k": 21, "q5_k": 22, "q6_k": 23}
WEIGHT_FORMATS = {"f32": 16, "bf16": 17, "i8": 24, **_BLOCK_FORMATS, **{f"{name}_a8": code + 32 for name, code in _BLOCK_FORMATS.items()}}
SYMBOLS = {"": 0, "T": 1, "S": 2, "R": 3}


class LibraryUnavailable(Exception):
    """The shared library is not there or cannot run here; the message says why and what to do."""


class KernelFault(Exception):
    """A native kernel refused its operands: our bug, not the user's."""


class Tensor(ctypes.Structure):
    """pg_tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("symbol", ctypes.c_int32),
    )


class Instruction(ctypes.Structure):
    """pg_instruction."""

    _fields_ = (
        ("opcode", ctypes.c_int32),
        ("barrier", ctypes.c_int32),
        ("t", Tensor * _MAX_TENSORS),
        ("i", ctypes.c_int64 * _MAX_INTS),
        ("f", ctypes.c_double * _MAX_FLOATS),
    )


def describe(operand: np.ndarray | Weight | None) -> Tensor:
    """The C view of an operand. ValueError for an array whose rows are not contiguous or whose type no kernel reads."""
    if operand is None:
        return Tensor()
    if isinstance(operand, Weight):
        rows, cols = operand.shape
        return Tensor(operand.data.ctypes.data, rows, cols, cols, WEIGHT_FORMATS[operand.format], 0)
    if operand.dtype not in DTYPES:
        raise ValueError(f"no kernel reads arrays of type {operand.dtype}")
    code, size = DTYPES[operand.dtype], operand.itemsize
    if operand.ndim == 2:
        row_bytes, column_bytes = operand.strides
        if (column_bytes != size and operand.shape[1] > 1) or row_bytes % size or row_bytes < 0:
            raise ValueError(f"operand of shape {operand.shape} has strides {operand.strides}; rows must be contiguous")
        stride = row_bytes // size if operand.shape[0] > 1 else max(row_bytes // size, operand.shape[1])
        return Tensor(operand.ctypes.data, *operand.shape, stride, code, 0)
    if not operand.flags.c_contiguous:
        raise ValueError(f"operand of shape {operand.shape} must be contiguous")
    return Tensor(operand.ctypes.data, operand.shape[0], 1, 1, code, 0)


def _load(path: Path) -> ctypes.CDLL:
    if not path.exists():
        raise LibraryUnavailable(f"{path.name} was not built (it needs a C++ compiler: python pagoda/csrc/build.py)")
    try:
        dll = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryUnavailable(f"{path.name} cannot be loaded: {error}") from error
    if dll.pg_abi() != _ABI:
        raise LibraryUnavailable(f"{path.name} is of another version; rebuild it: python pagoda/csrc/build.py")
    pointer, text, integer, wide = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int64
    code, cpus = ctypes.POINTER(Instruction), ctypes.POINTER(ctypes.c_int)
    for name, result, arguments in (
        ("pg_last_error", text, ()),
        ("pg_isa_count", integer, ()),
        ("pg_isa_name", text, (integer,)),
        ("pg_isa_supported", integer, (integer,)),
        ("pg_op_count", integer, ()),
        ("pg_op_name", text, (integer,)),
        ("pg_open", pointer, (text, integer, cpus)),
        ("pg_close", None, (pointer,)),
        ("pg_set_isa", integer, (pointer, text)),
        ("pg_set_threads", integer, (pointer, integer, cpus)),
        ("pg_isa", text, (pointer,)),
        ("pg_num_threads", integer, (pointer,)),
        ("pg_check_op", integer, (pointer, code)),
        ("pg_run_op", integer, (pointer, code)),
        ("pg_program_create", pointer, (pointer, code, wide)),
        ("pg_program_run", integer, (pointer, wide, wide, wide)),
        ("pg_program_feed", None, (pointer, pointer, pointer, wide, ctypes.c_int32, wide)),
        ("pg_program_follow", None, (pointer, pointer, pointer, pointer)),
        ("pg_program_start", integer, (pointer, wide, wide, wide)),
        ("pg_program_join", integer, (pointer, pointer, pointer)),
        ("pg_program_nanoseconds", wide, (pointer,)),
        ("pg_program_progress", wide, (pointer,)),
        ("pg_program_wait", wide, (pointer, wide, wide)),
        ("pg_program_free", None, (pointer,)),
        ("pg_program_trace", None, (pointer, integer)),
        ("pg_program_times", wide, (pointer, pointer, pointer, wide)),
    ):
        function = getattr(dll, name)
        function.restype, function.argtypes = result, arguments
    return dll


def _cpu_array(cpus: Sequence[int] | None) -> Any:
    return (ctypes.c_int * len(cpus))(*cpus) if cpus else None


class Library:
    """A loaded library with its pool of threads. `num_calls` counts native calls, of ops and of programs."""

    def __init__(self, *, isa: str | None = None, num_threads: int = 1, cpus: Sequence[int] | None = None) -> None:
        self.dll = _load(PATH)
        self.num_calls = 0
        self._opcodes = {self.dll.pg_op_name(k).decode(): k for k in range(self.dll.pg_op_count())}
        self.handle = self.dll.pg_open(isa.encode() if isa else None, num_threads, _cpu_array(cpus))
        if not self.handle:
            raise LibraryUnavailable(self.last_error())

    def last_error(self) -> str:
        return str(self.dll.pg_last_error().decode())

    @property
    def ops(self) -> list[str]:
        return list(self._opcodes)

    @property
    def isas(self) -> list[str]:
        """Instruction sets this machine can run, worst first."""
        indices = range(self.dll.pg_isa_count())
        return [self.dll.pg_isa_name(k).decode() for k in indices if self.dll.pg_isa_supported(k)]

    @property
    def isa(self) -> str:
        return str(self.dll.pg_isa(self.handle).decode())

    @property
    def num_threads(self) -> int:
        return int(self.dll.pg_num_threads(self.handle))

    def set_isa(self, name: str) -> None:
        """Switches the kernels; programs recorded before follow. LibraryUnavailable when this CPU cannot run it."""
        if self.dll.pg_set_isa(self.handle, name.encode()):
            raise LibraryUnavailable(self.last_error())

    def set_threads(self, num_threads: int, cpus: Sequence[int] | None = None) -> None:
        """Replaces the pool: `num_threads` including the caller; thread i > 0 is pinned to cpus[i] when given."""
        assert cpus is None or len(cpus) >= num_threads
        if self.dll.pg_set_threads(self.handle, num_threads, _cpu_array(cpus)):
            raise LibraryUnavailable(self.last_error())

    def instruction(
        self, op: str, tensors: Sequence[Tensor], ints: Sequence[int] = (), floats: Sequence[float] = ()
    ) -> Instruction:
        """The C form of one op, checked. ValueError when types or shapes do not fit the op."""
        made = Instruction(
            self._opcodes[op], 1, (Tensor * _MAX_TENSORS)(*tensors), (ctypes.c_int64 * _MAX_INTS)(*ints), (ctypes.c_double * _MAX_FLOATS)(*floats)
        )
        if self.dll.pg_check_op(self.handle, ctypes.byref(made)):
            shapes = [(t.rows, t.cols) for t in tensors]
            raise ValueError(f"{self.last_error()}; operands {shapes}")
        return made

    def run(self, instruction: Instruction) -> None:
        """Runs one op now. KernelFault when an operand holds something impossible, such as an id outside a table."""
        self.num_calls += 1
        if self.dll.pg_run_op(self.handle, ctypes.byref(instruction)):
            raise KernelFault(self.last_error())

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.dll.pg_close(self.handle)


@functools.cache
def default() -> Library:
    """The library of this process, opened at the first use with a thread for every CPU it may run on."""
    return Library(isa=env.isa(), num_threads=_num_cpus())


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
