"""The API process's side of the engine process: start it, talk to it, notice when it stalls or dies.

`EngineProcess.start` returns at once, so that the API process can import and load its own things while weights load.
`ProcessClient` is the core as the API sees it. It remembers which samples have not ended: when the process dies each of them gets its
one terminal output. Restarting the process and replaying those requests would begin here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from pagoda.base import errors
from pagoda.base.clock import Clock, monotonic
from pagoda.base.config import EngineConfig
from pagoda.base.errors import EngineDead, PagodaError
from pagoda.base.types import EngineOutput, FinishReason, GenerateRequest
from pagoda.engine.stats import EngineStats
from pagoda.executor.channel import (
    Abort,
    Call,
    CallReply,
    Dead,
    EngineInfo,
    FrontChannel,
    Hello,
    Outputs,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Submit,
    ToFront,
)

__all__ = ["BUILDER", "EngineHandle", "EngineProcess", "ProcessClient"]

BUILDER = "pagoda.executor.launch:build_engine"
_CODE = "import sys; sys.path[:] = {path!r}; from pagoda.executor.multiproc import main; main()"
_PING_SECONDS = 2.0
_STALL_SECONDS = 10.0
_STALL_STEPS = 10.0
_LAST_WORDS_SECONDS = 0.1  # what a process said before it ended may still be in the pipe


class EngineHandle(Protocol):
    """An engine process as a client of it needs to know it; `EngineProcess` is one for the process that started it."""

    @property
    def channel(self) -> FrontChannel: ...

    def wait(self) -> str:
        """Block until the process has ended; how it ended, in words."""

    def stop(self) -> None:
        """This client will not need it any more."""


class EngineProcess:
    """A started engine process and the directory of its pipes."""

    def __init__(self, process: subprocess.Popen[bytes], directory: str, channel: FrontChannel) -> None:
        self._process, self._directory = process, directory
        self._is_stopped = False
        self._channel = channel

    @property
    def channel(self) -> FrontChannel:
        return self._channel

    @property
    def directory(self) -> str:
        """Where the pipes are; readable by this user only, and removed by `stop`."""
        return self._directory

    @classmethod
    def start(cls, config: EngineConfig, *, builder: str = BUILDER, log_level: str = "info") -> EngineProcess:
        """Start it and return; the model loads there. `builder` is "module:function"."""
        directory = tempfile.mkdtemp(prefix="pagoda-")  # readable by this user only
        channel = FrontChannel(directory)
        code = _CODE.format(path=sys.path)
        process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE)
        hello = msgspec.msgpack.encode(Hello(directory, builder, config, log_level))
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once, which its client will notice
            process.stdin.write(len(hello).to_bytes(8, "little") + hello)
            process.stdin.flush()  # and kept open: the child ends when it closes
        return cls(process, directory, channel)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> str:
        """Block until the process has ended; how it ended, in words."""
        status = self._process.wait()
        if status >= 0:
            return f"the engine process ended with status {status}"
        name = signal.Signals(-status).name
        return f"the engine process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")

    def stop(self, timeout: float = 5.0) -> None:
        """Ask it to end, and end it if it does not. May be called twice."""
        if self._is_stopped:
            return
        self._is_stopped = True
        if self.is_alive:
            self.channel.send(Shutdown())
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self.channel.close()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class ProcessClient:
    """The core behind a channel, for one event loop. Methods without `async` never block."""

    def __init__(self, process: EngineHandle, clock: Clock = monotonic) -> None:
        """Must be made inside the running event loop."""
        self._process, self._channel, self._clock = process, process.channel, clock
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._outputs: list[EngineOutput] = []
        self._has_outputs = asyncio.Event()
        self._live: dict[str, set[int]] = {}  # request id -> samples that have not ended
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._death: PagodaError | None = None
        self._last_heard, self._longest_step = clock(), 0.0
        self._fd = self._channel.fd
        self._loop.add_reader(self._fd, self._read)
        self._pinger = self._loop.call_later(_PING_SECONDS, self._ping)
        threading.Thread(target=self._watch, name="pagoda-engine-watch", daemon=True).start()
        self._read()

    async def wait_ready(self) -> EngineInfo:
        """Until the model is loaded. Raises what the builder raised, or EngineDead."""
        return await asyncio.shield(self._ready)

    @property
    def is_alive(self) -> bool:
        return self._death is None

    def submit(self, request: GenerateRequest) -> None:
        """Raises EngineDead; everything else comes back as the request's outputs."""
        self._check()
        self._live[request.request_id] = set(range(request.params.n))
        self._channel.send(Submit(request, self._channel.front))

    def abort(self, ids: Iterable[str | tuple[str, int]], reason: FinishReason = FinishReason.ABORT) -> None:
        """End samples; their terminal outputs still come. Nothing happens when the engine is dead."""
        if self._death is None:
            self._channel.send(Abort(list(ids), reason))

    async def get_outputs(self) -> list[EngineOutput]:
        """Everything new, oldest first; waits until there is something."""
        while not self._outputs:
            self._has_outputs.clear()
            await self._has_outputs.wait()
        outputs, self._outputs = self._outputs, []
        return outputs

    async def call(self, method: str, *args: Any) -> Any:
        """A method of the core. Structs come back as plain dicts. Raises EngineDead, or what the method raised."""
        self._check()
        call_id = next(self._call_ids)
        future = self._calls[call_id] = self._loop.create_future()
        try:
            self._channel.send(Call(call_id, method, list(args), self._channel.front))
            return await future
        finally:
            self._calls.pop(call_id, None)

    async def stats(self) -> EngineStats:
        """The core's figures as of its next step boundary."""
        return msgspec.convert(await self.call("stats"), EngineStats)

    def check_health(self) -> None:
        """Raises EngineDead unless the loop has shown life within max(10 s, ten times its longest step)."""
        self._check()
        if not self._ready.done():
            raise EngineDead("the model is still loading", code="loading")
        silence, limit = self._clock() - self._last_heard, max(_STALL_SECONDS, _STALL_STEPS * self._longest_step)
        if silence > limit:
            raise EngineDead(f"the engine's loop has made no progress for {silence:.0f} s", code="stalled")

    def close(self) -> None:
        """Stop the process. What is still in flight ends with EngineDead."""
        self._die(EngineDead("the engine was shut down", code="shutting_down"))
        self._process.stop()

    def _check(self) -> None:
        if self._death is not None:
            raise self._death

    def _read(self) -> None:
        """The channel may have messages; take them all, for the descriptor tells only once."""
        if self._death is not None:
            return
        while messages := self._channel.receive():
            self._last_heard = self._clock()
            for message in messages:
                self._take(message)

    def _take(self, message: ToFront) -> None:
        match message:
            case Outputs(outputs, longest_step):
                self._longest_step = longest_step
                self._deliver(outputs)
            case CallReply():
                self._answer(message)
            case Pong(longest_step):
                self._longest_step = longest_step
            case Ready(info):
                if not self._ready.done():
                    self._ready.set_result(info)
            case Dead(text, error_type):
                self._die(_error(error_type, text))

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None and (live := self._live.get(output.request_id)) is not None:
                live.discard(output.index)
                if not live:
                    del self._live[output.request_id]
        self._outputs += outputs
        self._has_outputs.set()

    def _answer(self, reply: CallReply) -> None:
        future = self._calls.pop(reply.call_id, None)
        if future is None or future.done():
            return
        if reply.error is None:
            future.set_result(reply.result)
        else:
            future.set_exception(_error(reply.error_type or "EngineDead", reply.error))

    def _ping(self) -> None:
        if self._death is not None:
            return
        if self._clock() - self._last_heard >= _PING_SECONDS:
            self._channel.send(Ping(self._channel.front))
        self._pinger = self._loop.call_later(_PING_SECONDS, self._ping)

    def _watch(self) -> None:
        how = self._process.wait()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_WORDS_SECONDS, self._ended, how)

    def _ended(self, how: str) -> None:
        self._read()
        self._die(EngineDead(how, code="engine_dead"))

    def _die(self, error: PagodaError) -> None:
        """The first cause counts. Whoever waits is told."""
        if self._death is not None:
            return
        self._death = error
        self._pinger.cancel()
        self._loop.remove_reader(self._fd)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # nobody may be waiting
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        ends = [
            EngineOutput(request_id=request_id, index=i, finish_reason=FinishReason.ERROR, error=error.message, error_type="EngineDead")
            for request_id, indices in self._live.items()
            for i in sorted(indices)
        ]
        if ends:
            self._deliver(ends)


def _error(error_type: str, message: str) -> PagodaError:
    """The exception that was raised over there."""
    kind = getattr(errors, error_type, EngineDead)
    made: PagodaError = kind(message)
    return made
