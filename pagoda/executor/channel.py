"""What the API process and the engine process say to each other: msgspec structs over two ZMQ pipes, nothing else.

    API process                                   engine process
    PUSH (connects)  --- requests.ipc --->        PULL (binds)      Submit Abort Call Ping Shutdown
    PULL (binds)     <--- outputs.ipc ----        PUSH (connects)   Ready Outputs CallReply Pong Dead

One message carries all outputs of one engine step. Whoever connects may send before the other side is there: the message waits in
the pipe. Queues are unbounded: what is in them is bounded by the requests admitted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import zmq

from pagoda.base.config import EngineConfig
from pagoda.base.types import EngineOutput, FinishReason, GenerateRequest, ModelFacts

__all__ = [
    "Abort",
    "Call",
    "CallReply",
    "CoreChannel",
    "Dead",
    "EngineInfo",
    "FrontChannel",
    "Hello",
    "Outputs",
    "Ping",
    "Pong",
    "Ready",
    "Shutdown",
    "Submit",
]

_RECONNECT_MS = 10  # quick at first, for the other side is just starting
_RECONNECT_MAX_MS = 1000


class Hello(msgspec.Struct):
    """The first words, through the engine process's standard input."""

    directory: str  # where the pipes are
    builder: str  # "module:function", EngineConfig -> LocalEngine
    config: EngineConfig
    log_level: str


class Submit(msgspec.Struct, tag=True):
    request: GenerateRequest


class Abort(msgspec.Struct, tag=True):
    ids: list[str | tuple[str, int]]  # a request with all its samples, or one sample
    reason: FinishReason = FinishReason.ABORT


class Call(msgspec.Struct, tag=True):
    """A method of the core by name; answered by one CallReply with the same id."""

    call_id: int
    method: str
    args: list[Any] = []


class Ping(msgspec.Struct, tag=True):
    """Answered at the next step boundary: proof that the loop goes round."""


class Shutdown(msgspec.Struct, tag=True):
    pass


ToCore = Submit | Abort | Call | Ping | Shutdown


class EngineInfo(msgspec.Struct, kw_only=True):
    """What the API process learns when the model is loaded."""

    config: EngineConfig  # resolved
    facts: ModelFacts
    num_blocks: int
    block_size: int
    num_kv_tokens: int
    max_concurrency: float
    report: list[str]  # lines: what was chosen and why, and the memory ledger
    load_seconds: float


class Ready(msgspec.Struct, tag=True):
    info: EngineInfo


class Outputs(msgspec.Struct, tag=True):
    outputs: list[EngineOutput]
    longest_step: float  # seconds, so far


class CallReply(msgspec.Struct, tag=True):
    call_id: int
    result: Any = None
    error: str | None = None
    error_type: str | None = None  # class of base.errors


class Pong(msgspec.Struct, tag=True):
    longest_step: float


class Dead(msgspec.Struct, tag=True):
    """The last message: why the engine process ends."""

    message: str
    error_type: str  # class of base.errors


ToFront = Ready | Outputs | CallReply | Pong | Dead


def _addresses(directory: str | Path) -> tuple[str, str]:
    return f"ipc://{directory}/requests.ipc", f"ipc://{directory}/outputs.ipc"


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    return socket


class FrontChannel:
    """The API process's end. Nothing here blocks; `fd` becomes readable when messages may be there."""

    def __init__(self, directory: str | Path) -> None:
        requests, outputs = _addresses(directory)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._out, self._in = _socket(self._context, zmq.PUSH), _socket(self._context, zmq.PULL)
        self._in.bind(outputs)
        self._out.connect(requests)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToFront).decode

    @property
    def fd(self) -> int:
        """Edge-triggered: after it fired, `receive` until it returns nothing."""
        return int(self._in.getsockopt(zmq.FD))

    def send(self, message: ToCore) -> None:
        self._out.send(self._encode(message), zmq.NOBLOCK)

    def receive(self) -> list[ToFront]:
        """All messages that are there."""
        return [self._decode(raw) for raw in _drain(self._in)]

    def close(self) -> None:
        self._out.close()
        self._in.close()
        self._context.term()


class CoreChannel:
    """The engine process's end."""

    _FLUSH_MS = 2000  # how long `close` waits for the last messages to leave

    def __init__(self, directory: str | Path) -> None:
        requests, outputs = _addresses(directory)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._in, self._out = _socket(self._context, zmq.PULL), _socket(self._context, zmq.PUSH)
        self._in.bind(requests)
        self._out.connect(outputs)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToCore).decode

    def send(self, message: ToFront) -> None:
        self._out.send(self._encode(message), zmq.NOBLOCK)

    def wait(self, milliseconds: int) -> bool:
        """Until a message is there; False when the time is over."""
        return bool(self._in.poll(milliseconds))

    def receive(self) -> list[ToCore]:
        """All messages that are there."""
        return [self._decode(raw) for raw in _drain(self._in)]

    def close(self) -> None:
        self._out.setsockopt(zmq.LINGER, self._FLUSH_MS)
        self._in.close()
        self._out.close()
        self._context.term()


def _drain(socket: zmq.Socket[bytes]) -> list[bytes]:
    found: list[bytes] = []
    while True:
        try:
            found.append(socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return found
