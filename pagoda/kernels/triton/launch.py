"""How a Triton kernel is started, and what all of them share.

Every launch goes through `launch`, so that a test can collect launches instead of running them (`collect`) and compile
each for GPUs that are not there. Wrappers compute grids and tiles from shapes only: nothing is read back from the
device, so every op can be captured in a CUDA graph, and runs on torch's `meta` tensors while being collected. Sizes that
change with the batch are not specialised: a kernel is compiled once for a model's shapes, not again for a step's.

Under TRITON_INTERPRET=1 kernels run in Triton's interpreter on torch CPU tensors. The interpreter keeps bfloat16 as raw
16-bit integers, which casts understand and arithmetic does not: kernels load, widen to float32, compute, and `narrow` last.
`dot` is the one exception on hardware, and widens its operands in the interpreter. Bounds of loops go through `index`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRET", "LOG2E", "Arch", "Launch", "arch_of", "cdiv", "check_rows", "collect", "dot", "index", "launch", "narrow", "next_power_of_2", "tanh"]

Array = Any
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)

cdiv: Callable[[int, int], int] = triton.cdiv
next_power_of_2: Callable[[int], int] = triton.next_power_of_2


class Arch(NamedTuple):
    """What tiles are chosen for: ("cuda", 90) is sm_90, ("hip", 942) gfx942."""

    backend: str
    number: int


NO_GPU = Arch("cuda", 90)  # what the interpreter runs


@dataclass(frozen=True)
class Launch:
    """One launch that was collected: the kernel, its positional arguments and its compile-time ones."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]
    options: dict[str, int]


@dataclass
class _Collector:
    stack: list[tuple[Arch, list[Launch]]] = field(default_factory=list)


_COLLECTOR = _Collector()


@contextmanager
def collect(arch: Arch = NO_GPU) -> Iterator[list[Launch]]:
    """Launches made inside are appended to the list it yields and not run, with the tiles of `arch`. Not thread safe; for
    compiling ahead of time.
    """
    found: list[Launch] = []
    _COLLECTOR.stack.append((arch, found))
    try:
        yield found
    finally:
        _COLLECTOR.stack.pop()


def arch_of(x: Array) -> Arch:
    """The architecture that will run a kernel on this tensor."""
    if _COLLECTOR.stack:
        return _COLLECTOR.stack[-1][0]
    return _arch_of_device(x.device.index or 0) if x.is_cuda else NO_GPU


@cache
def _arch_of_device(number: int) -> Arch:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(number).gcnArchName  # as gfx942:sramecc+:xnack-
        return Arch("hip", int(name.split(":")[0].removeprefix("gfx"), 10))
    major, minor = torch.cuda.get_device_capability(number)
    return Arch("cuda", 10 * major + minor)


def launch(kernel: Any, grid: Sequence[int], *args: Any, num_warps: int = 4, num_stages: int = 2, **meta: Any) -> None:
    """Starts `kernel` on the current stream; an empty grid starts nothing."""
    if _COLLECTOR.stack:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        _COLLECTOR.stack[-1][1].append(Launch(kernel, tuple(grid), args, meta, options))
        return
    if min(grid) > 0:
        kernel[tuple(grid)](*args, **meta, num_warps=num_warps, num_stages=num_stages)


def check_rows(op: str, **arrays: Array) -> None:
    """ValueError unless each array given has contiguous columns and they all have equally many rows."""
    rows = {int(x.shape[0]) for x in arrays.values() if x is not None}
    if len(rows) > 1:
        raise ValueError(f"op `{op}`: operands have different numbers of rows: {sorted(rows)}")
    for name, x in arrays.items():
        if x is not None and x.ndim == 2 and x.shape[1] > 1 and x.stride(1) != 1:
            raise ValueError(f"op `{op}`: the columns of `{name}` are not contiguous")


@triton.jit
def dot(a, b, acc):
    """acc + a b, accumulated in float32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 -> `dtype`, rounded to nearest; the interpreter's own cast to bfloat16 cuts digits off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def index(x):
    """A scalar of the device as the bound of a loop; the interpreter keeps scalars as arrays, which `range` refuses."""
    if INTERPRET:
        return x.handle.data.item()
    else:
        return x


@triton.jit
def tanh(x):
    """By the exponential function, which saturates instead of overflowing."""
    return 1 - 2 / (tl.exp(2 * x) + 1)
