"""Types that several threads decode into."""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

__all__ = ["prepared"]

T = TypeVar("T")
_PREPARING = threading.Lock()
_PREPARED: set[type] = set()


def prepared(kind: type[T]) -> type[T]:
    """`kind` itself, examined by msgspec. It does that when a type is first decoded, calling Python on the way, and two threads that
    do it at once end the process with a segmentation fault (0.22)."""
    if kind not in _PREPARED:
        with _PREPARING:
            msgspec.json.Decoder(kind)
            _PREPARED.add(kind)
    return kind
