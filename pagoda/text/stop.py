"""Stop strings over a stream of text.

The stream is read character by character: the first position at which some stop string is complete ends it, and of
several complete there the longest counts. That is the same however the stream is cut. What may still become a stop
string is held back, so no beginning of one is ever handed out.

    handed out ............|held: longest end of the stream that begins a stop string|next
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["StopChecker", "Stopped"]


class Stopped(NamedTuple):
    """Text to hand out, and the stop string that ended the stream, if one did."""

    text: str
    stop: str | None


class StopChecker:
    def __init__(self, stop: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        """`stop` must not have an empty string in it."""
        assert all(stop)
        self._stops = tuple(stop)
        self._firsts = frozenset(string[0] for string in stop)
        self._max_held = max((len(string) for string in stop), default=1) - 1
        self._includes_stop = include_stop_str_in_output
        self._held = ""

    def feed(self, text: str, *, may_stop: bool = True) -> Stopped:
        """Add text to the stream. With `may_stop` False (min_tokens) a string that this text completes does not count."""
        num_held = len(self._held)
        stream = self._held + text
        if may_stop and text and (found := self._find(stream, num_held)):
            start, stop = found
            end = start + len(stop)
            return Stopped(stream[: end if self._includes_stop else start], stop)
        num_free = self._num_free(stream)
        self._held = stream[num_free:]
        return Stopped(stream[:num_free], None)

    def flush(self) -> str:
        """The text still held, when the stream has ended for another reason."""
        text, self._held = self._held, ""
        return text

    def _find(self, stream: str, num_held: int) -> tuple[int, str] | None:
        """Start and string of the first match that ends behind `num_held`; the longest of those that end there."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = stream.find(stop, max(0, num_held + 1 - len(stop)))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _num_free(self, stream: str) -> int:
        """How many characters cannot be part of a later match."""
        for at in range(max(0, len(stream) - self._max_held), len(stream)):
            if stream[at] in self._firsts:
                rest = stream[at:]
                if any(stop.startswith(rest) for stop in self._stops):
                    return at
        return len(stream)
