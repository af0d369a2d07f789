"""`--api-server-count N`: the main process of a server whose HTTP is spoken by N others.

It keeps the listening sockets and the engine process, starts the API processes, passes signals on to them and writes the line of figures
every 10 seconds. Each API process has a socket of its own on the same port (SO_REUSEPORT), so that the kernel spreads connections;
a Unix socket is shared. One that dies is replaced: its requests are taken out of the engine, its socket waits for the successor. One that dies
before it was ready, or the _MAX_DEATHS-th within a minute, ends the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from pagoda.base import errors
from pagoda.base.config import EngineConfig, ServerConfig
from pagoda.base.errors import EngineDead, PagodaError
from pagoda.base.log import get_logger
from pagoda.executor.channel import Leave
from pagoda.executor.process import EngineProcess, ProcessClient
from pagoda.serve.api_process import ApiHello
from pagoda.serve.figures import SharedFigures
from pagoda.serve.metrics import ServerMetrics, StatsLog

__all__ = ["supervise"]

logger = get_logger("serve")

_CODE = "import sys; sys.path[:] = {path!r}; from pagoda.serve.api_process import main; main()"
_MAX_DEATHS = 5
_MINUTE = 60.0
_LINE_BYTES = 1 << 20  # the longest report


def supervise(
    config: EngineConfig, server: ServerConfig, process: EngineProcess, listeners: Sequence[socket.socket], *, loader: str, log_level: str
) -> int:
    """Serve until told to stop. Returns the exit code; errors of loading are raised, and EngineDead when API processes keep dying."""
    return asyncio.run(_Supervisor(config, server, process, listeners, loader, log_level).run())


class _Child:
    """One API process."""

    def __init__(self, front: int, process: asyncio.subprocess.Process) -> None:
        self.front, self.process = front, process

    def order(self, words: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(ConnectionError, RuntimeError):  # it has ended, which whoever waits for it will see
            self.process.stdin.write(words.encode() + b"\n")

    async def report(self) -> dict[str, object]:
        """What it says next; nothing when it has ended."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        found: dict[str, object] = json.loads(line) if line else {}
        return found


class _Supervisor:
    def __init__(
        self, config: EngineConfig, server: ServerConfig, process: EngineProcess, listeners: Sequence[socket.socket], loader: str, log_level: str
    ) -> None:
        self._config, self._server, self._process, self._listeners = config, server, process, listeners
        self._loader, self._log_level = loader, log_level
        self._fronts = itertools.count(1)
        self._children: set[_Child] = set()
        self._deaths: deque[float] = deque(maxlen=_MAX_DEATHS)
        self._num_unready = server.api_server_count
        self._is_stopping = False

    async def run(self) -> int:
        client = ProcessClient(self._process)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        beside = [asyncio.create_task(self._watch_engine())]
        if not self._server.disable_log_stats:
            beside.append(asyncio.create_task(self._log_stats(client)))
        keeping = [asyncio.create_task(self._keep(client, listener)) for listener in self._listeners]
        try:
            await asyncio.gather(*keeping)  # the first error ends the server
            return 0
        finally:
            for task in (*beside, *keeping):
                task.cancel()
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
            await asyncio.gather(*beside, *keeping, return_exceptions=True)
            await asyncio.gather(*(child.process.wait() for child in self._children))
            client.close()

    async def _keep(self, client: ProcessClient, listener: socket.socket) -> None:
        """One API process after the other on this socket, until the server stops."""
        is_first = True
        while not self._is_stopping:
            child = await self._start(listener)
            words = await child.report()
            if "ready" in words:
                self._announce(str(words["ready"]), is_first=is_first)
            status = await child.process.wait()
            self._children.discard(child)
            self._process.channel.send(Leave(child.front))
            SharedFigures.bury(self._process.directory, child.front)
            if self._is_stopping:
                return
            how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            if "ready" not in words and not client.is_alive:
                await client.wait_ready()  # raises what loading met: a process that came late has not heard it
            if "failed" in words:
                raise _failure(words["failed"])
            if "ready" not in words:
                raise EngineDead(f"API process {child.front} was {how} before it was ready")
            self._count_death(child.front, how)
            is_first = False

    def _count_death(self, front: int, how: str) -> None:
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == _MAX_DEATHS and now - self._deaths[0] < _MINUTE:
            raise EngineDead(f"{_MAX_DEATHS} API processes died within a minute, the last one {how}: the server ends")
        logger.error("API process %d was %s; its requests are lost, and another process takes its place", front, how)

    async def _start(self, listener: socket.socket) -> _Child:
        front = next(self._fronts)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", _CODE.format(path=sys.path),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, pass_fds=[listener.fileno()], limit=_LINE_BYTES,
        )  # fmt: skip
        child = _Child(front, process)
        self._children.add(child)
        hello = ApiHello(self._process.directory, front, listener.fileno(), self._config, self._server, self._loader, self._log_level)
        raw = msgspec.msgpack.encode(hello)
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(len(raw).to_bytes(8, "little") + raw)
            await process.stdin.drain()
        return child

    def _announce(self, text: str, *, is_first: bool) -> None:
        """Once, when every one of the first processes takes requests."""
        self._num_unready -= is_first
        if is_first and self._num_unready == 0:
            print(f"{text}\nHTTP is spoken by {self._server.api_server_count} processes", file=sys.stderr, flush=True)

    async def _watch_engine(self) -> None:
        """The news of the engine's end, which only its parent gets."""
        how = await asyncio.to_thread(self._process.wait)
        if not self._is_stopping and self._num_unready == 0:
            logger.error("%s", how)
        for child in self._children:
            child.order(f"dead {how}")

    async def _log_stats(self, client: ProcessClient) -> None:
        """The line of figures every 10 seconds, while there is an engine."""
        metrics = ServerMetrics()
        log = StatsLog(metrics)
        with contextlib.suppress(PagodaError):  # its end is told by who watches it
            await client.wait_ready()
            while True:
                await asyncio.sleep(StatsLog.INTERVAL)
                metrics.update_core(await client.stats())
                log.emit()

    def _on_signal(self) -> None:
        self._is_stopping = True
        for listener in self._listeners:
            listener.close()  # or connections would wait here for a process that takes them
        for child in self._children:
            child.order("stop")


def _failure(words: object) -> PagodaError:
    """The error that the API process met."""
    assert isinstance(words, list)
    kind = getattr(errors, words[0], EngineDead)
    made: PagodaError = kind(words[1])
    return made
