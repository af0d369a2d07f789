"""The sending side of one event stream: headers when there is something to say, comments in silence, an end for readers that stop.

    quiet for `keep_alive` seconds         a comment is sent (and the headers, if nothing was said yet)
    one write waits `stall` seconds        the reader takes nothing: its request is cancelled, and nobody else's

Between us and the reader stand the socket's buffer and uvicorn's; when both are full a write waits, and what the engine makes
meanwhile is kept as one growing answer, never longer than the request allows. One timer per stream, none per token.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Send

__all__ = ["KEEP_ALIVE", "StreamWriter"]

KEEP_ALIVE = b": keep-alive\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class StreamWriter:
    """`async with` it around the stream, in the task to cancel. Seconds; 0 is never."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], *, keep_alive: float, stall: float) -> None:
        self.has_started = False
        self.is_stalled = False  # the task was cancelled for it
        self._send, self._headers = send, headers
        self._keep_alive, self._stall = keep_alive or float("inf"), stall or float("inf")
        self._loop = asyncio.get_running_loop()
        self._waiting_since: float | None = None
        self._last = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._pings: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> StreamWriter:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._set_timer()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for ping in self._pings:
            ping.cancel()

    async def write(self, chunk: bytes, *, is_last: bool = False) -> None:
        """Waits for the reader where it is slow."""
        self._waiting_since = self._loop.time()
        await self._start()
        await self._send({"type": "http.response.body", "body": chunk, "more_body": not is_last})
        self._waiting_since, self._last = None, self._loop.time()

    async def _ping(self) -> None:
        if self._waiting_since is None:
            await self.write(KEEP_ALIVE)

    async def _start(self) -> None:
        if not self.has_started:
            self.has_started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *self._headers]})

    def _set_timer(self) -> None:
        period = min(self._keep_alive, self._stall)
        if period < float("inf"):
            self._timer = self._loop.call_later(period / 2, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        if self._waiting_since is not None:
            if now - self._waiting_since >= self._stall:
                self.is_stalled = True
                self._task.cancel()
                return
        elif now - self._last >= self._keep_alive:
            ping = self._loop.create_task(self._ping())
            self._pings.add(ping)
            ping.add_done_callback(self._pings.discard)
        self._set_timer()
