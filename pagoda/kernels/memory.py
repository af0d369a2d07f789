"""Memory for weights, cache planes and arenas: zeroed, aligned, lazily touched, on huge pages where the system has them.

Kernels stream through hundreds of megabytes a token; with 4 KiB pages a part of the time goes into looking addresses up.
Small pieces are therefore cut from slabs; a slab is given back when the last array cut from it is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

__all__ = ["ALIGNMENT", "allocate", "touch"]

ALIGNMENT = 64
_HUGE = 2 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14 and later
_SLAB = 32 << 20


class _Slab:
    """The slab small pieces are being cut from."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rest = np.empty(0, np.uint8)

    def cut(self, nbytes: int) -> np.ndarray:
        step = -(-nbytes // ALIGNMENT) * ALIGNMENT
        with self.lock:
            if len(self.rest) < step:
                self.rest = _map(_SLAB)
            piece, self.rest = self.rest[:nbytes], self.rest[step:]
        return piece


_SLABS = _Slab()


def allocate(nbytes: int) -> np.ndarray:
    """`nbytes` zero bytes starting on a cache line -> uint8. Memory is used up only where it is written."""
    if nbytes < _SLAB // 8:
        return _SLABS.cut(nbytes)
    return _map(nbytes)[:nbytes]


def touch(arrays: Sequence[np.ndarray]) -> threading.Thread:
    """Has the system find and clear the first huge page of each array, in a thread. A page takes 0.2 ms, or several where a virtual
    machine's host has to find it too: for a cache of many planes a good part of a start, which may as well pass beside it."""
    thread = threading.Thread(target=_populate, args=(arrays,), name="touch", daemon=True)
    thread.start()
    return thread


def _populate(arrays: Sequence[np.ndarray]) -> None:
    """Whole pages of each array's beginning. The call leaves the interpreter to others meanwhile, as a write from numpy would not."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
    page = mmap.PAGESIZE
    for array in arrays:
        address = array.ctypes.data
        start = -(-address // page) * page
        length = (address + min(array.nbytes, _HUGE) - start) // page * page
        if length <= 0:
            continue
        if madvise is None or madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _POPULATE_WRITE):
            return  # a system that cannot: pages come when they are first written


def _map(nbytes: int) -> np.ndarray:
    """Whole huge pages of fresh memory from the system, which the array keeps until it and its views are gone."""
    size = -(-nbytes // _HUGE) * _HUGE
    mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without huge pages: ordinary ones do
            mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % _HUGE
    return whole[start : start + size]
