"""The engine process: one core, one loop, one channel.

    main: read Hello -> build the engine -> Ready -> loop: take messages, step, send outputs -> Dead or silence

It is started with the parent's module path and a Hello on its standard input. It ends on Shutdown, on a failure of its own, and when
standard input closes: then the parent is gone. Signals meant for the whole process group (Ctrl-C, a stopped service) are the
parent's to handle: it drains first.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from pagoda.base.clock import Clock, monotonic
from pagoda.base.errors import PagodaError
from pagoda.base.log import get_logger, setup_logging
from pagoda.base.types import EngineOutput, GenerateRequest
from pagoda.executor.channel import (
    Abort,
    Call,
    CallReply,
    CoreChannel,
    Dead,
    EngineInfo,
    Hello,
    Join,
    Leave,
    Outputs,
    Ping,
    Pong,
    Ready,
    Shutdown,
    Submit,
    ToCore,
)

__all__ = ["CALLS", "CoreLoop", "main"]

logger = get_logger("executor")

CALLS = frozenset({"stats", "reset_prefix_cache", "check_integrity", "warm_up_grammars"})
"""Methods of the core that may be called from outside."""

_IDLE_MS = 1000  # after so much idleness the core's books are checked, once


class Engine(Protocol):
    """The part of `launch.LocalEngine` that is needed here; test builders return their own."""

    core: Any  # EngineCore
    config: Any
    facts: Any
    ledger: Any

    def close(self) -> None: ...


class Owners:
    """Which front asked for which request, where that is not front 0: with one API process there is nothing to keep."""

    def __init__(self) -> None:
        self._owners: dict[str, tuple[int, set[int]]] = {}  # request id -> front, samples that have not ended

    def note(self, request: GenerateRequest, front: int) -> None:
        if front:
            self._owners[request.request_id] = front, set(range(request.params.n))

    def of(self, front: int) -> list[str]:
        """Requests of `front` that have not ended."""
        return [name for name, (owner, _) in self._owners.items() if owner == front]

    def split(self, outputs: list[EngineOutput]) -> list[tuple[int, list[EngineOutput]]]:
        """Outputs by whom they are for, in their order. Requests that have ended are forgotten."""
        if not outputs or not self._owners:
            return [(0, outputs)] if outputs else []
        parts: dict[int, list[EngineOutput]] = {}
        for output in outputs:
            front, live = self._owners.get(output.request_id, (0, set()))
            parts.setdefault(front, []).append(output)
            if front and output.finish_reason is not None:
                live.discard(output.index)
                if not live:
                    del self._owners[output.request_id]
        return list(parts.items())


class CoreLoop:
    """Messages in, steps, outputs out, until told to stop."""

    def __init__(self, engine: Engine, channel: CoreChannel, ready: Ready, clock: Clock = monotonic) -> None:
        """`ready` is what a front hears that joins."""
        self._core, self._channel, self._ready, self._clock = engine.core, channel, ready, clock
        self._owners = Owners()
        self._longest_step = 0.0
        self._is_stopping = False
        self._is_checked = True

    def run(self) -> None:
        core = self._core
        while not self._is_stopping:
            if core.has_work():
                self._handle(self._channel.receive())
                self._step()
            elif self._channel.wait(_IDLE_MS):
                self._handle(self._channel.receive())
            elif not self._is_checked:
                core.check_integrity()
                self._is_checked = True

    def _step(self) -> None:
        started = self._clock()
        outputs = self._core.step()
        self._longest_step = max(self._longest_step, self._clock() - started)
        self._is_checked = False
        for front, theirs in self._owners.split(outputs):
            self._channel.send(Outputs(theirs, self._longest_step), front)
        if self._core.failure is not None:  # its requests have their error; the others go on
            logger.error("a step failed:\n%s", "".join(traceback.format_exception(self._core.failure)))
            self._core.failure = None

    def _handle(self, messages: list[ToCore]) -> None:
        for message in messages:
            match message:
                case Submit(_, front) if self._channel.has_left(front):
                    continue
                case Submit(request, front):
                    self._owners.note(request, front)
                    self._core.submit(request)
                case Abort(ids, reason):
                    self._core.abort(ids, reason)
                case Call():
                    self._channel.send(self._call(message), message.front)
                case Ping(front):
                    self._channel.send(Pong(self._longest_step), front)
                case Join(front):
                    self._channel.join(front)
                    self._channel.send(self._ready, front)
                case Leave(front):
                    self._channel.leave(front)
                    self._core.abort(self._owners.of(front))
                case Shutdown():
                    self._is_stopping = True

    def _call(self, call: Call) -> CallReply:
        assert call.method in CALLS, f"`{call.method}` is not for callers outside"
        try:
            return CallReply(call.call_id, getattr(self._core, call.method)(*call.args))
        except PagodaError as exc:
            return CallReply(call.call_id, None, exc.message, type(exc).__name__)


def _info(engine: Engine, seconds: float) -> EngineInfo:
    ledger = engine.ledger
    return EngineInfo(
        config=engine.config,
        facts=engine.facts,
        num_blocks=ledger.num_blocks,
        block_size=ledger.block_size,
        num_kv_tokens=ledger.num_kv_tokens,
        max_concurrency=ledger.max_concurrency,
        report=ledger.lines(),
        load_seconds=seconds,
    )


def _builder(name: str) -> Callable[[Any], Engine]:
    module, _, function = name.partition(":")
    build: Callable[[Any], Engine] = getattr(importlib.import_module(module), function)
    return build


def _die_with_parent(directory: str) -> None:
    """Standard input is a pipe that the parent holds open; it ends when the parent does, however that happens."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(1)


def serve_core(hello: Hello, channel: CoreChannel) -> int:
    """Build the engine and run its loop. Returns the exit status; every failure leaves a Dead message."""
    engine: Engine | None = None
    try:
        started = time.monotonic()
        engine = _builder(hello.builder)(hello.config)
        ready = Ready(_info(engine, time.monotonic() - started))
        channel.send(ready)
        gc.freeze()  # what loading left behind is never garbage: collections in the loop need not look at it
        CoreLoop(engine, channel, ready).run()
        return 0
    except PagodaError as exc:
        channel.send_to_all(Dead(exc.message, type(exc).__name__))
        return 1
    except Exception as exc:
        logger.error("the engine process fails:\n%s", traceback.format_exc())
        channel.send_to_all(Dead(f"{type(exc).__name__}: {exc}", "EngineDead"))
        return 1
    finally:
        if engine is not None:
            engine.close()
        channel.close()


def main() -> None:
    """Entry of the engine process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stdin = sys.stdin.buffer
    hello = msgspec.msgpack.decode(stdin.read(int.from_bytes(stdin.read(8), "little")), type=Hello)
    threading.Thread(target=_die_with_parent, args=(hello.directory,), name="pagoda-parent-watch", daemon=True).start()
    setup_logging(hello.log_level)
    status = serve_core(hello, CoreChannel(hello.directory))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the watching thread and the kernels' threads have nothing left to say
