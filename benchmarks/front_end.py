"""What a token costs in front of the engine: detokenizing, JSON, the event, the socket. The engine is one that does nothing.

    .venv/bin/python benchmarks/front_end.py [--streams 256] [--tokens 200] [--route chat] [--vllm build/peers/vllm/venv/bin/python]

A process serves the real application over a core that gives every running request one token per turn of the event loop; this
process reads, and asks the operating system for the CPU seconds that the other one spent. Two figures:

    microseconds of CPU per token, one event per token, at so many streams
    requests per second of one token each, and their CPU milliseconds

With `--vllm` (the Python of an environment that has vLLM; `make bench-peers` makes one) the same client then loads vLLM's server and ours over a
model of one layer with random weights, each with its engine in a process of its own, and counts the CPU time of the API process alone: what
its engine sends is received and decoded in there too, which the engine that does nothing spares.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
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


class Found(NamedTuple):
    us_per_token: float  # of CPU
    requests_per_second: float  # of one token each


async def run(options: argparse.Namespace, process: psutil.Process, port: int, who: str, model: str | None = None) -> Found:
    """Loads the server on `port` and prints its two figures."""
    path, asked = PATHS[options.route], {"prompt": "Hello"} if options.route == "text" else {"messages": [{"role": "user", "content": "Hello"}]}
    body = {**asked, "stream": True, "max_tokens": options.tokens, "temperature": 0, "ignore_eos": True} | ({"model": model} if model else {})
    await measure(process, port, path, [body | {"max_tokens": 20}] * 16, 16)  # everything is loaded
    found = await measure(process, port, path, [body] * options.streams, options.streams)
    num_tokens = options.streams * options.tokens
    per_token = 1e6 * found.cpu_seconds / num_tokens
    print(
        f"{who}: {options.streams} streams of {options.tokens} tokens, {options.route}: {per_token:.1f} us of CPU per token, "
        f"{num_tokens / found.seconds:,.0f} tokens/s, {found.events / num_tokens:.2f} events per token",
        flush=True,
    )
    short = {**body, "stream": False, "max_tokens": 1}
    many = await measure(process, port, path, [short] * options.requests, 64)
    rate = options.requests / many.seconds
    print(f"{who}: {options.requests} requests of 1 token: {rate:,.0f} requests/s, {1e3 * many.cpu_seconds / options.requests:.2f} ms of CPU each", flush=True)
    return Found(per_token, rate)


# ---- beside vLLM


def write_tiny(folder: Path) -> None:
    """A random Llama of one layer with the default model's tokenizer and template: an engine with nearly nothing to do."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pagoda.executor.front import load_front

    front = load_front(EngineConfig())
    end = front.eos_token_ids[0]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=front.tokenizer.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=MAX_MODEL_LEN, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    front.tokenizer.backend.save(str(folder / "tokenizer.json"))
    assert front.template is not None
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **front.tokenizer.special_tokens, "chat_template": front.template.sources["default"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


@contextmanager
def server(command: list[str], port: int, log: Path, seconds: float, **env: str) -> Iterator[psutil.Process]:
    """The API process of a server that answers; its whole group ends with the block. SystemExit where it does not get there."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, **env}, process_group=0)
    try:
        give_up = time.monotonic() + seconds
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > give_up:
                last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
                raise SystemExit(f"`{' '.join(command[:4])} ...` does not serve: {' / '.join(last)}")
            time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        _end(process)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the server, and what is left of its group is killed."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def beside_vllm(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny(folder / "tiny")
        model, port = str(folder / "tiny"), options.port + 1
        sizes = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(options.streams), "--port", str(port), "--host", HOST, "--disable-log-stats"]
        ours = [sys.executable, "-m", "pagoda.cli", "serve", model, *sizes]
        theirs = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "bfloat16", "--enforce-eager", *sizes]
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        found = []
        for who, command, more in (("pagoda serve", ours, {}), ("vllm serve", theirs, env)):
            with server(command, port, folder / "log", options.start_seconds, **more) as process:
                found.append(asyncio.run(run(options, process, port, who, model if who.startswith("vllm") else None)))
        a, b = found
        print(f"vLLM's API process takes {b.us_per_token / a.us_per_token:.1f} times our CPU per token; we answer {a.requests_per_second / b.requests_per_second:.1f} times its requests")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--route", choices=list(PATHS), default="chat")
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python of an environment with vLLM, whose server is then measured too")
    parser.add_argument("--start-seconds", type=float, default=300, help="most seconds until a server answers")
    options = parser.parse_args()
    child = multiprocessing.get_context("spawn").Process(target=serve, args=(options.port,), daemon=True)
    child.start()
    try:
        asyncio.run(wait_for(options.port))
        asyncio.run(run(options, psutil.Process(child.pid), options.port, "null engine"))
    finally:
        child.terminate()
        child.join()
    if options.vllm:
        beside_vllm(options)


if __name__ == "__main__":
    main()
