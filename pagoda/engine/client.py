"""The core as the API floor sees it: requests go in, outputs come out, whoever runs the loop.

    ThreadClient    here: the core runs in a thread of this process, for embedding in a Python program
    ProcessClient   executor/process.py: the core runs in a process of its own

Both promise: `submit` and `abort` return at once; every sample gets exactly one output with a finish reason, even when the
core dies (then it is an error of type EngineDead).
"""

from __future__ import annotations

import asyncio
import queue
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from pagoda.base.clock import Clock, monotonic
from pagoda.base.errors import EngineDead
from pagoda.base.log import get_logger
from pagoda.base.types import EngineOutput, FinishReason, GenerateRequest
from pagoda.engine.core import EngineCore, SampleId
from pagoda.engine.stats import EngineStats

__all__ = ["CoreClient", "ThreadClient"]

_STALL_SECONDS = 10.0
_STALL_STEPS = 10.0  # of the longest step

_log = get_logger("engine")


class CoreClient(Protocol):
    """For one event loop."""

    def submit(self, request: GenerateRequest) -> None:
        """Raises EngineDead; every other error comes back as the request's outputs."""

    def abort(self, ids: Iterable[SampleId], reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends samples; unknown ids are passed over. Terminal outputs still come."""

    async def get_outputs(self) -> list[EngineOutput]:
        """Everything new, oldest first; waits until there is something."""

    async def call(self, method: str, *args: Any) -> Any:
        """A rare method of the core by name, between two steps."""

    async def stats(self) -> EngineStats:
        """The core's figures as of now."""

    def check_health(self) -> None:
        """Raises EngineDead when the loop has stopped or makes no progress."""

    def close(self) -> None:
        """Ends the loop. What is in flight ends with EngineDead."""


@dataclass(frozen=True)
class _Work:
    """A method of the core to call in its thread. Without a future nobody waits, and an error ends the loop."""

    method: str
    args: tuple[Any, ...]
    future: Future[Any] | None = None

    def do(self, core: EngineCore) -> None:
        try:
            result = getattr(core, self.method)(*self.args)
        except Exception as error:
            if self.future is None:
                raise
            self.future.set_exception(error)
        else:
            if self.future is not None:
                self.future.set_result(result)


class ThreadClient:
    """Runs `core` in a daemon thread; nobody else may touch it. Outputs go to the event loop that first asks for them."""

    def __init__(self, core: EngineCore, *, clock: Clock = monotonic) -> None:
        self._core, self._clock = core, clock
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the four fields below
        self._outputs: list[EngineOutput] = []
        self._live: dict[str, set[int]] = {}
        self._wake: Callable[[], None] | None = None
        self._death: EngineDead | None = None
        self._has_outputs = asyncio.Event()
        self._last_progress, self._longest_step = clock(), 0.0
        self._is_busy = False
        self._thread = threading.Thread(target=self._run, name="pagoda-core", daemon=True)
        self._thread.start()

    # ---- the event loop's side

    def submit(self, request: GenerateRequest) -> None:
        with self._lock:
            if self._death is not None:
                raise self._death
            self._live[request.request_id] = set(range(request.params.n))
            self._inbox.put(_Work("submit", (request,)))

    def abort(self, ids: Iterable[SampleId], reason: FinishReason = FinishReason.ABORT) -> None:
        self._inbox.put(_Work("abort", (list(ids), reason)))

    async def get_outputs(self) -> list[EngineOutput]:
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                self._wake = lambda: _call_soon(loop, self._has_outputs.set)
                outputs, self._outputs = self._outputs, []
                self._has_outputs.clear()
            if outputs:
                return outputs
            await self._has_outputs.wait()

    async def call(self, method: str, *args: Any) -> Any:
        future: Future[Any] = Future()
        with self._lock:
            if self._death is not None:
                raise self._death
            self._inbox.put(_Work(method, args, future))
        return await asyncio.wrap_future(future)

    async def stats(self) -> EngineStats:
        found = await self.call("stats")
        assert isinstance(found, EngineStats)
        return found

    def check_health(self) -> None:
        if self._death is not None:
            raise self._death
        silence, limit = self._clock() - self._last_progress, max(_STALL_SECONDS, _STALL_STEPS * self._longest_step)
        if self._is_busy and silence > limit:
            raise EngineDead(f"the engine's loop has made no progress for {silence:.0f} s", code="stalled")

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        why = EngineDead("the engine was shut down", code="shutting_down")
        try:
            self._loop()
        except Exception as error:
            _log.error("the engine's loop failed:\n%s", traceback.format_exc())
            why = EngineDead(f"the engine's loop failed: {type(error).__name__}: {error}", code="engine_dead")
        self._die(why)

    def _loop(self) -> None:
        while True:
            self._is_busy = self._core.has_work()
            self._last_progress = self._clock()
            while self._inbox.qsize() or not self._is_busy:
                work = self._inbox.get()
                if work is None:
                    return
                work.do(self._core)
                self._is_busy = self._core.has_work()
                self._last_progress = self._clock()
            outputs = self._core.step()
            self._longest_step = max(self._longest_step, self._clock() - self._last_progress)
            if outputs:
                self._deliver(outputs)

    def _deliver(self, outputs: list[EngineOutput]) -> None:
        with self._lock:
            for output in outputs:
                if output.finish_reason is not None and (live := self._live.get(output.request_id)) is not None:
                    live.discard(output.index)
                    if not live:
                        del self._live[output.request_id]
            self._outputs += outputs
            if self._wake is not None:
                self._wake()

    def _die(self, why: EngineDead) -> None:
        with self._lock:
            self._death = why
            ends = [
                EngineOutput(request_id=name, index=index, finish_reason=FinishReason.ERROR, error=why.message, error_type="EngineDead")
                for name, indices in self._live.items()
                for index in sorted(indices)
            ]
        self._deliver(ends)
        while self._inbox.qsize():
            work = self._inbox.get()
            if work is not None and work.future is not None:
                work.future.set_exception(why)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)
