"""What one API process counts, and how several make one answer of it.

The core counts requests and tokens; what only the front sees is counted here. With --api-server-count above 1 each process writes its
figures into a file beside the engine's pipes, at most _WRITE_SECONDS after they changed; whoever is asked for /metrics adds up its own
and the others' files. The file of a process that died stays, without its gauges: counters never go back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pagoda.engine.stats import Histogram

__all__ = ["FrontFigures", "SharedFigures"]

_WRITE_SECONDS = 0.05


class FrontFigures(msgspec.Struct):
    """Gauges as of now; counters and histograms since the start."""

    server_load: int = 0  # requests being answered now
    stalled_streams: int = 0  # ended because nobody read them
    tool_calls: dict[tuple[str, str], int] = {}  # answers searched for tool calls, by parser and result (calls, none)
    http_requests: dict[tuple[str, str, str], int] = {}  # by route, method, class of status
    http_seconds: dict[tuple[str, str], Histogram] = {}  # by route and method

    def plus(self, others: Iterable[FrontFigures]) -> FrontFigures:
        """The sum, as a new object; self where there are no others."""
        found = None
        for other in others:
            found = found or msgspec.msgpack.decode(msgspec.msgpack.encode(self), type=FrontFigures)
            found._add(other)
        return found or self

    def _add(self, other: FrontFigures) -> None:
        self.server_load += other.server_load
        self.stalled_streams += other.stalled_streams
        for call, count in other.tool_calls.items():
            self.tool_calls[call] = self.tool_calls.get(call, 0) + count
        for request, count in other.http_requests.items():
            self.http_requests[request] = self.http_requests.get(request, 0) + count
        for route, more in other.http_seconds.items():
            mine = self.http_seconds.setdefault(route, Histogram.of(more.bounds))
            mine.counts = [a + b for a, b in zip(mine.counts, more.counts, strict=True)]
            mine.total += more.total


class SharedFigures:
    """Process number `front` among those whose files are in `directory`."""

    def __init__(self, directory: str, front: int, own: FrontFigures) -> None:
        self._directory, self._front, self._own = Path(directory), front, own
        self._written = b""

    async def keep_written(self) -> None:
        """Until cancelled; then once more."""
        try:
            while True:
                self.write()
                await asyncio.sleep(_WRITE_SECONDS)
        finally:
            self.write()

    def write(self) -> None:
        """Nothing happens where nothing has changed, and when the directory is gone: then the server ends."""
        raw = msgspec.msgpack.encode(self._own)
        if raw != self._written:
            with contextlib.suppress(FileNotFoundError):
                _replace(_path(self._directory, self._front), raw)
                self._written = raw

    def others(self) -> list[FrontFigures]:
        """The other processes' figures, the dead ones' too."""
        mine = _path(self._directory, self._front)
        return [_read(path) for path in sorted(self._directory.glob("front-*.figures")) if path != mine]

    @staticmethod
    def bury(directory: str, front: int) -> None:
        """That process is dead: it answers nothing any more, what it counted stays."""
        path = _path(Path(directory), front)
        if path.exists():
            figures = _read(path)
            figures.server_load = 0
            _replace(path, msgspec.msgpack.encode(figures))


def _path(directory: Path, front: int) -> Path:
    return directory / f"front-{front}.figures"


def _read(path: Path) -> FrontFigures:
    return msgspec.msgpack.decode(path.read_bytes(), type=FrontFigures)


def _replace(path: Path, raw: bytes) -> None:
    """A reader sees the old bytes or the new ones, never a part."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(raw)
    os.replace(fresh, path)
