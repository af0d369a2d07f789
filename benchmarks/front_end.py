"""What a token costs in front of the engine: detokenizing, JSON, the event, the socket. The engine is one that does nothing.

    .venv/bin/python benchmarks/front_end.py [--streams 256] [--tokens 200] [--route chat]

A process serves the real application over a core that gives every running request one token per turn of the event loop; this
process reads, and asks the operating system for the CPU seconds that the other one spent. Two figures:

    microseconds of CPU per token, one event per token, at so many streams
    requests per second of one token each, and their CPU milliseconds
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import psutil

from pagoda.base.config import EngineConfig, ModelConfig, ServerConfig
from pagoda.base.types import EngineOutput, FinishReason, GenerateRequest, ModelFacts

HOST = "127.0.0.1"
PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions"}
MAX_MODEL_LEN = 4096


class NullClient:
    """A core without a model: every live request gets the next token of one fixed text each time outputs are asked for."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._live: dict[str, list[int]] = {}  # request id -> [tokens given, tokens to give]
        self._arrived = asyncio.Event()

    def submit(self, request: GenerateRequest) -> None:
        self._live[request.request_id] = [0, request.params.max_tokens or 16]
        self._arrived.set()

    def abort(self, ids: Iterable[Any], reason: FinishReason = FinishReason.ABORT) -> None:
        for name in ids:
            self._live.pop(name if isinstance(name, str) else name[0], None)

    async def get_outputs(self) -> list[EngineOutput]:
        await asyncio.sleep(0)
        while not self._live:
            self._arrived.clear()
            await self._arrived.wait()
        outputs = []
        for name, counts in list(self._live.items()):
            output = EngineOutput(request_id=name, new_token_ids=[self._token_ids[counts[0] % len(self._token_ids)]])
            counts[0] += 1
            if counts[0] == counts[1]:
                output.finish_reason = FinishReason.LENGTH
                del self._live[name]
            outputs.append(output)
        return outputs

    def check_health(self) -> None:
        return None

    def close(self) -> None:
        return None


def serve(port: int) -> None:
    """The child process."""
    import uvicorn
    import uvloop

    from pagoda.api.async_engine import AsyncEngine
    from pagoda.api.processor import Processor
    from pagoda.executor.front import load_front
    from pagoda.serve.app import build_app
    from pagoda.serve.context import ModelContext, ServerState

    async def run() -> None:
        front = load_front(EngineConfig())
        config = replace(EngineConfig(), model=ModelConfig(max_model_len=MAX_MODEL_LEN))
        facts = ModelFacts(
            architecture="none", vocab_size=front.tokenizer.vocab_size, max_model_len=MAX_MODEL_LEN, num_layers=1, kv_groups=(),
            num_kv_planes=1, num_kv_heads=1, head_dim=1, dtype="float32",
        )  # fmt: skip
        text = "The quick brown fox jumps over the lazy dog, and then it sleeps: nobody knows why. " * 4
        client = NullClient(front.tokenizer.encode(text, add_special_tokens=False))
        engine = AsyncEngine(client, Processor(config, facts, front.tokenizer))  # type: ignore[arg-type]
        state = ServerState(ServerConfig())
        state.ready(
            ModelContext(
                model_names=("null",), model_path="null", max_model_len=MAX_MODEL_LEN, max_logprobs=20, tokenizer=front.tokenizer,
                template=front.template,
            ),
            engine,
        )  # fmt: skip
        await uvicorn.Server(uvicorn.Config(build_app(state), host=HOST, port=port, log_level="warning", http="httptools", ws="none")).serve()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


class Tally(NamedTuple):
    events: int
    seconds: float
    cpu_seconds: float


async def exchange(port: int, path: str, body: dict[str, Any]) -> int:
    """One request over a connection of its own; -> the number of events, `[DONE]` aside."""
    raw = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    count, rest = 0, b""
    while chunk := await reader.read(1 << 16):
        count += (rest + chunk).count(b"data: {")
        rest = chunk[-6:]
    writer.close()
    return count


async def measure(process: psutil.Process, port: int, path: str, bodies: list[dict[str, Any]], at_once: int) -> Tally:
    places = asyncio.Semaphore(at_once)

    async def one(body: dict[str, Any]) -> int:
        async with places:
            return await exchange(port, path, body)

    before, started = process.cpu_times(), time.perf_counter()
    counts = await asyncio.gather(*[one(body) for body in bodies])
    after = process.cpu_times()
    return Tally(sum(counts), time.perf_counter() - started, after.user + after.system - before.user - before.system)


async def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            return
        except OSError:
            await asyncio.sleep(0.05)
    raise SystemExit("the server did not start")


async def run(options: argparse.Namespace, process: psutil.Process) -> None:
    path, asked = PATHS[options.route], {"prompt": "Hello"} if options.route == "text" else {"messages": [{"role": "user", "content": "Hello"}]}
    await wait_for(options.port)
    body = {**asked, "stream": True, "max_tokens": options.tokens, "temperature": 0}
    await measure(process, options.port, path, [body | {"max_tokens": 20}] * 16, 16)  # everything is loaded
    found = await measure(process, options.port, path, [body] * options.streams, options.streams)
    num_tokens = options.streams * options.tokens
    print(
        f"{options.streams} streams of {options.tokens} tokens, {options.route}: {1e6 * found.cpu_seconds / num_tokens:.1f} us of CPU per token, "
        f"{num_tokens / found.seconds:,.0f} tokens/s, {found.events / num_tokens:.2f} events per token"
    )
    short = {**asked, "max_tokens": 1, "temperature": 0}
    many = await measure(process, options.port, path, [short] * options.requests, 64)
    print(f"{options.requests} requests of 1 token: {options.requests / many.seconds:,.0f} requests/s, {1e3 * many.cpu_seconds / options.requests:.2f} ms of CPU each")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--route", choices=list(PATHS), default="chat")
    parser.add_argument("--port", type=int, default=18431)
    options = parser.parse_args()
    child = multiprocessing.get_context("spawn").Process(target=serve, args=(options.port,), daemon=True)
    child.start()
    try:
        asyncio.run(run(options, psutil.Process(child.pid)))
    finally:
        child.terminate()
        child.join()


if __name__ == "__main__":
    main()
