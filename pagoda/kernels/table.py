"""Which implementation answers an op: (op name, device) -> function, chosen by the device of the first operand.

Devices on a CPU host:

    cpu        numpy arrays, native library
    reference  numpy arrays without the library, and torch tensors on the CPU; the definition of truth
    record     symbolic arrays: the op is appended to a program instead of run
    cuda       torch tensors on a GPU: Triton kernels, imported when first asked for

Under `backend("cuda")` torch tensors on the CPU count as a GPU's: how Triton's interpreter runs the kernels without one.

An implementation registers itself with `@implements("rms_norm", device="cpu")`. `backend("reference")` forces what
numpy arrays use, for tests.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from pagoda.base import env

__all__ = ["CannotRecord", "backend", "devices_of", "implements", "lookup", "numpy_device", "ops_registered"]

log = logging.getLogger(__name__)
Implementation = Callable[..., Any]
F = TypeVar("F", bound=Implementation)


class CannotRecord(Exception):
    """The op has no recording implementation; the caller runs the model op by op instead."""

    def __init__(self, op: str, reason: str = "it has no native kernel") -> None:
        super().__init__(f"op `{op}` cannot be recorded: {reason}")
        self.op = op


class _Table:
    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], Implementation] = {}
        self.forced: list[str] = []
        self.chosen: str | None = None
        self.has_triton = False


_TABLE = _Table()


def implements(op: str, *, device: str | tuple[str, ...]) -> Callable[[F], F]:
    """Registers the decorated function as `op` on the given device or devices."""

    def register(function: F) -> F:
        for name in (device,) if isinstance(device, str) else device:
            assert (op, name) not in _TABLE.rows, f"op `{op}` on `{name}` registered twice"
            _TABLE.rows[op, name] = function
        return function

    return register


@contextmanager
def backend(device: str) -> Iterator[None]:
    """Forces what numpy operands use, "cpu" or "reference", or what torch tensors on the CPU use, "cuda".

    Nests; not thread safe; for tests and comparisons.
    """
    _TABLE.forced.append(device)
    try:
        yield
    finally:
        _TABLE.forced.pop()


def numpy_device() -> str:
    """ "cpu" when the native library loads and is not refused by PAGODA_KERNELS, else "reference" (said once)."""
    if _TABLE.forced and _TABLE.forced[-1] != "cuda":
        return _TABLE.forced[-1]
    if _TABLE.chosen is None:
        _TABLE.chosen = _choose_numpy_device()
    return _TABLE.chosen


def _choose_numpy_device() -> str:
    from pagoda.kernels.cpu import library

    if env.kernels() == "reference":
        return "reference"
    try:
        library.default()
    except library.LibraryUnavailable as error:
        if env.kernels() == "native":
            raise
        log.warning("native kernels: %s; running on the numpy references, which are slow", error)
        return "reference"
    return "cpu"


def device_of(operand: Any) -> str:
    """The device an operand lives on."""
    if isinstance(operand, np.ndarray):
        return numpy_device()
    if device := getattr(operand, "kernel_device", None):
        return str(device)
    if type(operand).__module__.partition(".")[0] == "torch":
        kind = str(operand.device.type)
        if kind in ("cpu", "meta"):
            return "cuda" if "cuda" in _TABLE.forced[-1:] else "reference"
        return kind
    raise TypeError(f"no kernels for operands of type `{type(operand).__name__}`")


def lookup(op: str, operand: Any) -> Implementation:
    """The implementation of `op` for this operand; CannotRecord or LookupError when there is none."""
    device = device_of(operand)
    if device == "cuda" and not _TABLE.has_triton:
        importlib.import_module("pagoda.kernels.triton")  # registers its ops; needs torch, which a CPU host need not have
        _TABLE.has_triton = True
    found = _TABLE.rows.get((op, device))
    if found is not None:
        return found
    if device == "record":
        raise CannotRecord(op)
    raise LookupError(f"op `{op}` has no implementation for `{device}`; it has: {', '.join(devices_of(op)) or 'none'}")


def devices_of(op: str) -> list[str]:
    return sorted(device for name, device in _TABLE.rows if name == op)


def ops_registered() -> list[str]:
    return sorted({name for name, _ in _TABLE.rows})
