"""W6 through each engine's own OpenAI server, and the time from the launch of a process to its first token.

Pagoda, llama.cpp (llama-server, one slot for each client) and vLLM have servers; OpenVINO GenAI's wheel has none, and for
transformers none is started. All servers are up at once and stopped in their sleep; one client loads them in turn.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.contenders import Contender
from benchmarks.peers.environments import ROOT, PeerAbsent, llama_program, python_of
from benchmarks.peers.offline import SLOW, Sample, Samples, log_of
from benchmarks.peers.session import Others, Worker, end_group, peak_mib, wait_quiet
from benchmarks.workloads import ids, requests, run_server

__all__ = ["HAS_SERVER", "run_memory", "run_starts", "run_w6"]

HAS_SERVER = ("llama.cpp", "vllm", "pagoda")
_CLIENTS, _SLOT = 16, 512  # W6's requests take at most 400 tokens each
_POLL_SECONDS = 0.01
_MEMORY_KV_TOKENS, _START_KV_TOKENS = 32768, 8192


class Server:
    """A server process that answers. PeerAbsent with the last words of its log when it does not get there."""

    def __init__(self, contender: Contender, num_threads: int, kv_tokens: int, *, timeout: float = 400.0) -> None:
        self._port, self._log = _free_port(), log_of(contender, "server")
        self.base_url = f"http://127.0.0.1:{self._port}"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        words = _command(contender, num_threads, kv_tokens, self._port)
        env = contender.environment(num_threads, kv_tokens)
        launched = time.perf_counter()
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
            )
        try:
            self._wait(launched + timeout)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - launched

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def peak_mib(self) -> float:
        return peak_mib(self._process.pid)

    def close(self) -> None:
        end_group(self._process)

    def _wait(self, deadline: float) -> None:
        """Until a request for one token is answered."""
        while time.perf_counter() < deadline:
            if self._process.poll() is not None:
                raise PeerAbsent(f"its server ended with status {self._process.returncode}: {_last_line(self._log)}")
            try:
                with urllib.request.urlopen(f"{self.base_url}/v1/models", timeout=5.0) as answer:
                    model = json.load(answer)["data"][0]["id"]
                body = {"model": model, "prompt": ids(16, 1), "max_tokens": 1, "temperature": 0}
                headers = {"Content-Type": "application/json"}
                question = urllib.request.Request(f"{self.base_url}/v1/completions", json.dumps(body).encode(), headers)
                with urllib.request.urlopen(question, timeout=60.0) as answer:
                    json.load(answer)
                return
            except (urllib.error.URLError, OSError, LookupError, ValueError):
                time.sleep(_POLL_SECONDS)  # it does not listen yet, or still loads
        raise PeerAbsent(f"its server was not ready in time: {_last_line(self._log)}")


def run_w6(
    found: dict[str, list[Sample]], contenders: Sequence[Contender], rounds: int, num_threads: int, kv_tokens: int, absent: dict[str, str],
    *, keep_slow: bool, quiet_s: float,
) -> None:
    """Fills `found` by contender's name. A peer far behind the fastest is asked once, unless `keep_slow`."""
    servers: dict[str, Server] = {}
    try:
        for contender in (c for c in contenders if c.peer in HAS_SERVER):
            try:
                servers[contender.name] = Server(contender, num_threads, kv_tokens)
            except PeerAbsent as error:
                absent[f"{contender.name}, server"] = str(error)
                print(f"absent: {contender.name}, server: {error}", flush=True)
                continue
            servers[contender.name].pause()
            print(f"serving {contender.name}, {servers[contender.name].start_seconds:.2f} s from launch to first token", flush=True)
        for round in range(rounds):
            names = list(servers)
            for name in names[round % max(len(names), 1) :] + names[: round % max(len(names), 1)]:
                wait_quiet(quiet_s)
                servers[name].resume()
                found[name].append(_load(servers[name], round))
                servers[name].pause()
                print(f"round {round} W6      {name:32s} " + ", ".join(f"{k} {v:.4g}" for k, v in found[name][-1].items()), flush=True)
            for name in _slow_servers(contenders, found) if round == 0 and not keep_slow else ():
                servers.pop(name).close()
    finally:
        for server in servers.values():
            server.close()


def _slow_servers(contenders: Sequence[Contender], found: dict[str, list[Sample]]) -> list[str]:
    """All of W6's bars are against the fastest server there is, whatever its precision."""
    walls = {c.name: found[c.name][0]["wall s"] for c in contenders if not c.is_ours and found.get(c.name)}
    return [name for name, wall in walls.items() if wall > SLOW * min(walls.values())]


def _load(server: Server, round: int) -> Sample:
    """RuntimeError when other numbers of tokens came than were asked for."""
    others = Others()
    sample = asyncio.run(run_server(server.base_url, round))
    cores = others.cores()
    tokens = int(sample["out tok/s"] * sample["wall s"] + 0.5)
    wanted = sum(count for _, count in requests("W6", round))
    if tokens != wanted:
        raise RuntimeError(f"{wanted} tokens were asked for, and {tokens} came from {server.base_url}")
    return sample | {"peak MiB": server.peak_mib(), "others": cores}


def run_starts(contenders: Sequence[Contender], rounds: int, num_threads: int, absent: dict[str, str]) -> Samples:
    """Launch to first token: through the server where there is one, and in a Python process of its own."""
    found: Samples = {"start, server": defaultdict(list), "start, in process": defaultdict(list)}
    for round in range(rounds):
        for contender in contenders:
            if round and contender.peer == "vllm":
                continue  # a minute each time
            try:
                if contender.peer in HAS_SERVER:
                    server = Server(contender, num_threads, _START_KV_TOKENS)
                    found["start, server"][contender.name].append({"s": server.start_seconds, "peak MiB": server.peak_mib()})
                    server.close()
                if contender.peer != "vllm":
                    found["start, in process"][contender.name].append(_start_worker(contender, num_threads))
            except (PeerAbsent, RuntimeError) as error:
                absent[f"{contender.name}, start"] = str(error)
                print(f"absent: {contender.name}, start: {error}", flush=True)
                continue
            shown = {kind: rows[contender.name][-1] for kind, rows in found.items() if contender.name in rows}
            print(f"round {round} start {contender.name:32s} " + ", ".join(f"{k} {v['s']:.2f} s" for k, v in shown.items()), flush=True)
    return {kind: dict(rows) for kind, rows in found.items()}


def _start_worker(contender: Contender, num_threads: int) -> Sample:
    launched = time.perf_counter()
    worker = _worker(contender, num_threads, _START_KV_TOKENS)
    worker.ask({"do": "generate", "requests": [(ids(16, 1), 1)]})
    seconds, peak = time.perf_counter() - launched, worker.peak_mib()
    worker.close()
    return {"s": seconds, "peak MiB": peak}


def run_memory(contenders: Sequence[Contender], num_threads: int, absent: dict[str, str]) -> dict[str, list[Sample]]:
    """Peak resident memory of a fresh process that prefills 32 prompts of 128 tokens and decodes, all with one KV budget."""
    found: dict[str, list[Sample]] = {}
    for contender in (c for c in contenders if c.peer not in ("vllm", "transformers")):
        try:
            worker = _worker(contender, num_threads, _MEMORY_KV_TOKENS)
            worker.ask({"do": "generate", "requests": [(prompt, 8) for prompt, _ in requests("W3", 0)]})
        except (PeerAbsent, RuntimeError) as error:
            absent[f"{contender.name}, memory"] = str(error)
            continue
        found[contender.name] = [{"peak MiB": worker.peak_mib()}]
        worker.close()
        print(f"memory {contender.name:32s} {found[contender.name][0]['peak MiB']:.0f} MiB", flush=True)
    return found


def _worker(contender: Contender, num_threads: int, kv_tokens: int) -> Worker:
    words, env = contender.command(num_threads, kv_tokens), contender.environment(num_threads, kv_tokens)
    return Worker(contender.name, words, env, log_of(contender, "start"))


def _command(contender: Contender, num_threads: int, kv_tokens: int, port: int) -> list[str]:
    model = str(contender.model())
    if contender.peer == "llama.cpp":
        slots = ["--parallel", str(_CLIENTS), "-c", str(_CLIENTS * _SLOT)]
        server = [str(llama_program("llama-server")), "-m", model, "-t", str(num_threads), *slots]
        return [*server, "--cont-batching", "-fa", "on", "--no-ui", "--temp", "0", "--port", str(port)]
    sizes = ["--max-model-len", "4096", "--port", str(port)]
    if contender.peer == "vllm":
        limits = ["--max-num-seqs", "64", "--max-num-batched-tokens", "2048", "--disable-log-stats"]
        return [str(python_of("vllm")), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "bfloat16", *sizes, *limits]
    budget = ["--kv-cache-memory-bytes", str(kv_tokens * 23040), "--num-threads", str(num_threads), "--disable-log-stats"]
    options = [word for name, value in contender.options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "pagoda.cli", "serve", model, *sizes, *budget, *options]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][-300:] if lines else "it said nothing"
