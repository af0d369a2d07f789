"""Memory for weights, cache planes and arenas: zeroed, aligned, lazily touched, on huge pages where the system has them.

Kernels stream through hundreds of megabytes a token; with 4 KiB pages a part of the time goes into looking addresses up.
Small pieces are therefore cut from slabs; a slab is given back when the last array cut from it is gone.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

__all__ = ["ALIGNMENT", "allocate", "begin_small"]

ALIGNMENT = 64
_HUGE = 2 << 20
_USE_HUGE, _USE_SMALL, _COLLAPSE = 14, 15, 25  # MADV_HUGEPAGE, MADV_NOHUGEPAGE; MADV_COLLAPSE, of Linux 6.1 and later
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


def begin_small(arrays: Sequence[np.ndarray], *, seconds: float = 1.0) -> threading.Thread | None:
    """The first 2 MiB of each array come as small pages when they are written, and a thread makes huge ones of them after `seconds`.

    A huge page takes the system 0.2 ms to clear, or several where a virtual machine's host has to find it first, and a cache has
    planes by the dozen: the first request would wait for all of them. None where the system has no such choice.
    """
    spans = [(array.ctypes.data, array.ctypes.data + min(array.nbytes, _HUGE)) for array in arrays]
    inner = [(-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE) for start, stop in spans]
    inner = [(start, stop) for start, stop in inner if start < stop]
    if sys.platform != "linux" or not [span for span in inner if _advise(*span, _USE_SMALL)]:
        return None

    def grow(kept: Sequence[np.ndarray]) -> None:
        time.sleep(seconds)
        for start, stop in inner:
            _advise(start, stop, _USE_HUGE)
        for start, stop in inner:
            _advise(start // _HUGE * _HUGE, -(-stop // _HUGE) * _HUGE, _COLLAPSE)  # older systems do it in their own time
            time.sleep(0.01)  # forwards that need memory wait for each
        del kept

    thread = threading.Thread(target=grow, args=(arrays,), name="huge-pages", daemon=True)
    thread.start()
    return thread


def _advise(start: int, stop: int, advice: int) -> bool:
    """Whether the system took it. The interpreter is left to others meanwhile."""
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


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
