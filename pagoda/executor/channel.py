"""What the API process and the engine process say to each other: msgspec structs over two ZMQ pipes, nothing else.

    API process                                   engine process
    PUSH (connects)  --- requests.ipc --->        PULL (binds)      Submit Abort Call Ping Shutdown
    PULL (binds)     <--- outputs.ipc ----        PUSH (connects)   Ready Outputs CallReply Pong Dead

Several API processes may stand on the left: front 0 is the process that started the engine, the others come with Join and get pipes of
their own (outputs-N.ipc). A number is never used twice, so that nothing meant for a dead process reaches its successor.

One message carries all outputs of one engine step to one front. Whoever connects may send before the other side is there: the message waits in
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
    "Join",
    "Leave",
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


class Join(msgspec.Struct, tag=True):
    """From another API process: answered by Ready, now or when the model is loaded."""

    front: int


class Leave(msgspec.Struct, tag=True):
    """From front 0: that process has ended, and what it asked for with it."""

    front: int


class Submit(msgspec.Struct, tag=True):
    request: GenerateRequest
    front: int = 0


class Abort(msgspec.Struct, tag=True):
    ids: list[str | tuple[str, int]]  # a request with all its samples, or one sample
    reason: FinishReason = FinishReason.ABORT


class Call(msgspec.Struct, tag=True):
    """A method of the core by name; answered by one CallReply with the same id."""

    call_id: int
    method: str
    args: list[Any] = []
    front: int = 0


class Ping(msgspec.Struct, tag=True):
    """Answered at the next step boundary: proof that the loop goes round."""

    front: int = 0


class Shutdown(msgspec.Struct, tag=True):
    pass


ToCore = Join | Leave | Submit | Abort | Call | Ping | Shutdown


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


def _addresses(directory: str | Path, front: int) -> tuple[str, str]:
    return f"ipc://{directory}/requests.ipc", f"ipc://{directory}/outputs{f'-{front}' if front else ''}.ipc"


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
    return socket


class FrontChannel:
    """An API process's end. Nothing here blocks; `fd` becomes readable when messages may be there."""

    def __init__(self, directory: str | Path, front: int = 0) -> None:
        self.front = front
        requests, outputs = _addresses(directory, front)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._out, self._in = _socket(self._context, zmq.PUSH), _socket(self._context, zmq.PULL)
        self._in.bind(outputs)
        self._out.connect(requests)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToFront).decode
        if front:
            self.send(Join(front))

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
        self._directory = directory
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._in = _socket(self._context, zmq.PULL)
        self._in.bind(_addresses(directory, 0)[0])
        self._outs: dict[int, zmq.Socket[bytes]] = {}
        self._left: set[int] = set()  # their last messages may come after the news of their end
        self.join(0)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToCore).decode

    def join(self, front: int) -> None:
        """From now on `front` can be told something, unless it has left."""
        if front in self._left:
            return
        out = self._outs[front] = _socket(self._context, zmq.PUSH)
        out.connect(_addresses(self._directory, front)[1])

    def leave(self, front: int) -> None:
        """Nothing is meant for `front` any more."""
        self._left.add(front)
        if (out := self._outs.pop(front, None)) is not None:
            out.close()

    def has_left(self, front: int) -> bool:
        return front in self._left

    def send(self, message: ToFront, front: int = 0) -> None:
        """To a front that is there; what one that has left would have heard is dropped."""
        if (out := self._outs.get(front)) is not None:
            out.send(self._encode(message), zmq.NOBLOCK)

    def send_to_all(self, message: ToFront) -> None:
        for front in self._outs:
            self.send(message, front)

    def wait(self, milliseconds: int) -> bool:
        """Until a message is there; False when the time is over."""
        return bool(self._in.poll(milliseconds))

    def receive(self) -> list[ToCore]:
        """All messages that are there."""
        return [self._decode(raw) for raw in _drain(self._in)]

    def close(self) -> None:
        for out in self._outs.values():
            out.setsockopt(zmq.LINGER, self._FLUSH_MS)
            out.close()
        self._in.close()
        self._context.term()


def _drain(socket: zmq.Socket[bytes]) -> list[bytes]:
    found: list[bytes] = []
    while True:
        try:
            found.append(socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return found
