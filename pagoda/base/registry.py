"""A name -> thing table with errors that name the nearest match. Third parties add to it through entry points."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Generic, TypeVar

from pagoda.base.errors import ConfigError

__all__ = ["Registry", "nearest"]

T = TypeVar("T")


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean `x`?)`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""


class Registry(Generic[T]):
    """Rows are added at import of the module that owns them; a second row of the same name is our bug."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._rows: dict[str, T] = {}

    def add(self, name: str, value: T) -> T:
        assert name not in self._rows, f"{self._kind} `{name}` registered twice"
        self._rows[name] = value
        return value

    def get(self, name: str) -> T:
        """The row, or ConfigError naming the nearest match and all alternatives."""
        if name not in self._rows:
            known = sorted(self._rows)
            raise ConfigError(f"unknown {self._kind} `{name}`{nearest(name, known)}; known: {', '.join(known)}")
        return self._rows[name]

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._rows))
