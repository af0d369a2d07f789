"""One of several API processes: what it is told, what it tells, and the same server as ever in between.

    standard input     an ApiHello, then lines: "stop" (a signal reached the server), "dead HOW" (the engine process has ended);
                       its end means that the main process is gone
    standard output    one JSON line: {"ready": what to announce} or {"failed": [class of base.errors, message]}

Signals are the main process's to handle: a terminal's Ctrl-C reaches this process too, and is ignored.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import traceback
from typing import BinaryIO

import msgspec
import uvloop

from pagoda.base.config import EngineConfig, ServerConfig
from pagoda.base.errors import PagodaError
from pagoda.base.log import get_logger, setup_logging
from pagoda.executor.channel import FrontChannel
from pagoda.serve.server import Server, imported

__all__ = ["ApiHello", "main"]


class ApiHello(msgspec.Struct):
    """The first words."""

    directory: str  # where the engine's pipes are, and the figures
    front: int  # which of the processes this is, from 1; a successor of a dead one gets a new number
    listener: int  # file descriptor
    config: EngineConfig
    server: ServerConfig
    loader: str
    log_level: str


class _Engine:
    """The engine process as one sees it that did not start it."""

    def __init__(self, hello: ApiHello) -> None:
        self.channel = FrontChannel(hello.directory, hello.front)
        self._has_ended, self._how = threading.Event(), ""

    def ended(self, how: str) -> None:
        self._how = self._how or how
        self._has_ended.set()

    def wait(self) -> str:
        self._has_ended.wait()
        return self._how

    def stop(self) -> None:
        self.channel.close()


def main() -> None:
    """Entry of the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    reports = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # nothing but reports goes to the main process
    orders = sys.stdin.buffer
    hello = msgspec.msgpack.decode(orders.read(int.from_bytes(orders.read(8), "little")), type=ApiHello)
    setup_logging(hello.log_level)
    status = 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(hello, orders, reports))
    except PagodaError as error:
        status = 1
        _tell(reports, {"failed": [type(error).__name__, error.message]})
    except Exception:
        status = 1
        get_logger("serve").error("this API process fails:\n%s", traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the thread that waits for orders has nothing left to say


async def _serve(hello: ApiHello, orders: BinaryIO, reports: BinaryIO) -> None:
    engine = _Engine(hello)
    server = Server(
        hello.config, hello.server, imported(hello.loader), front=hello.front, figures_dir=hello.directory,
        announce=lambda text: _tell(reports, {"ready": text}),
    )  # fmt: skip
    loop = asyncio.get_running_loop()
    threading.Thread(target=_obey, args=(orders, engine, server, loop), name="pagoda-orders", daemon=True).start()
    await server.serve(engine, socket.socket(fileno=hello.listener))


def _obey(orders: BinaryIO, engine: _Engine, server: Server, loop: asyncio.AbstractEventLoop) -> None:
    for line in orders:
        order, _, rest = line.decode().strip().partition(" ")
        if order == "dead":
            engine.ended(rest)
        elif order == "stop":
            loop.call_soon_threadsafe(server.stop)
    engine.ended("the main process of this server has ended")
    for _ in range(2):
        loop.call_soon_threadsafe(server.stop)


def _tell(reports: BinaryIO, words: dict[str, object]) -> None:
    reports.write(json.dumps(words).encode() + b"\n")
