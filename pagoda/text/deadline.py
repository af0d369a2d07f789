"""A time limit on Python code that cannot be asked to stop: a chat template, which may loop for ever.

One thread watches; when the time is over it raises an exception inside the working thread, which reaches it at its next step of
bytecode. Whoever takes a key out of `_due` first, the worker at its end or the watcher at the limit, decides which of the two it was.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Deadline"]

T = TypeVar("T")

_TICK_SECONDS = 0.05


class _Expired(BaseException):
    """Raised by the watcher in the worker; no `except Exception` on the way swallows it."""


class Deadline:
    """Runs work of any threads, each within `seconds`. The watching thread lives while there is work."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._due: dict[int, tuple[float, int]] = {}  # key -> (when, thread)
        self._keys = itertools.count()
        self._lock = threading.Lock()  # never taken while work runs: an exception from outside could leave it locked
        self._is_watching = False

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; TimeoutError when it took too long."""
        key = next(self._keys)
        self._due[key] = (time.monotonic() + self.seconds, threading.get_ident())
        self._watch()
        is_expired = False
        try:
            try:
                return work()
            except _Expired:
                is_expired = True
                raise
            finally:
                if not is_expired and self._due.pop(key, None) is None:
                    time.sleep(60)  # the exception is on its way, and ends this
        except _Expired:
            raise TimeoutError(f"not done within {self.seconds:g} s") from None

    def _watch(self) -> None:
        with self._lock:
            if not self._is_watching:
                self._is_watching = True
                threading.Thread(target=self._look, name="pagoda-deadline", daemon=True).start()

    def _look(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            now = time.monotonic()
            for key, (when, thread) in list(self._due.items()):
                if now >= when and self._due.pop(key, None) is not None:
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_Expired))
            with self._lock:
                if not self._due:
                    self._is_watching = False
                    return
