"""`pagoda bench startup`: what a user waits for, from launching a process. Every run is a fresh process.

    import      `import pagoda`, over a Python that imports nothing
    help        `pagoda --help`
    complete    `pagoda complete TEXT` to its first output: the model in the command's own process
    ready       `pagoda serve` until /ready answers 200
    first token `pagoda serve` until the first token of a streamed request

Runs of the kinds take turns, so that a slow minute of the machine falls on all of them alike.
"""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pagoda.base import env
from pagoda.base.config import EngineConfig, field
from pagoda.base.errors import ConfigError, RequestFailed
from pagoda.bench.client import Client
from pagoda.bench.report import Report, Row, Spread
from pagoda.bench.server_process import command, running_server, write_config
from pagoda.executor.launch import describe_model

__all__ = ["Options", "measure"]

_PROMPT = "Once upon a time"
_LABELS = {
    "import": "import pagoda",
    "help": "pagoda --help",
    "complete_first_token": "pagoda complete, first token",
    "serve_ready": "pagoda serve, ready",
    "serve_first_token": "pagoda serve, first token",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    num_iters: int = field(5, "fresh processes of each kind")
    num_iters_warmup: int = field(1, "processes of each kind that do not count: they bring the files into memory")
    timeout: float = field(600.0, "seconds a process may take", metavar="SECONDS")


def measure(options: Options, config: EngineConfig) -> Report:
    """Raises ConfigError for options that cannot be measured, and what finding the model raises."""
    if options.num_iters < 1:
        raise ConfigError(f"`--num-iters` must be at least 1, got {options.num_iters}")
    source, *_ = describe_model(config)  # fetches it, and refuses what cannot run, before anything is timed
    found: dict[str, list[float]] = {name: [] for name in _LABELS}
    with tempfile.TemporaryDirectory(prefix="pagoda-bench-") as folder:
        config_file = write_config(config, Path(folder))
        for i in tqdm(range(options.num_iters_warmup + options.num_iters), desc="Rounds"):
            seconds = _round(config, config_file, options.timeout)
            if i >= options.num_iters_warmup:
                for name, value in seconds.items():
                    found[name].append(value)
    rows = [Row(f"median_{name}_s", _LABELS[name], Spread(values).at(50), "s") for name, values in found.items()]
    rows += [Row(f"max_{name}_s", f"{_LABELS[name]}, slowest", max(values), "s") for name, values in found.items()]
    title = f"Start-up: {source.path.name}, medians of {options.num_iters} fresh processes"
    return Report(title, rows, dataclasses.asdict(options), {"seconds": found})


def _round(config: EngineConfig, config_file: Path, timeout: float) -> dict[str, float]:
    nothing = _seconds([sys.executable, "-c", "pass"], timeout)
    imported = _seconds([sys.executable, "-c", "import pagoda"], timeout)
    seconds = {"import": max(0.0, imported - nothing), "help": _seconds(command("--help"), timeout)}
    words = command("complete", _PROMPT, "--config", str(config_file), "--temperature", "0", "--max-tokens", "1")
    seconds["complete_first_token"] = _seconds(words, timeout, _first_output)
    with running_server(config, timeout=timeout) as server:
        asyncio.run(_first_token(server.base_url))
        seconds["serve_first_token"] = time.perf_counter() - server.launched_at
        seconds["serve_ready"] = server.ready_at - server.launched_at
    return seconds


def _seconds(words: list[str], timeout: float, until: Callable[[subprocess.Popen[bytes]], None] | None = None) -> float:
    """From launching a process to its end, or to what `until` waits for. RequestFailed when it fails."""
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log) as process:
            if until is not None:
                until(process)
                seconds = time.perf_counter() - started
            process.communicate(timeout=timeout)
            if until is None:
                seconds = time.perf_counter() - started
        if process.returncode:
            log.seek(0)
            raise RequestFailed(f"`{' '.join(words)}` failed: {log.read()[-1000:].decode('utf-8', 'replace')}")
    return seconds


def _first_output(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    process.stdout.read(1)


async def _first_token(base_url: str) -> None:
    client = Client(base_url, backend="openai", api_key=env.api_key())
    try:
        seen = await client.send(_PROMPT, 0, max_tokens=1, temperature=0, ignore_eos=True)
    finally:
        await client.close()
    if not seen.is_ok:
        raise RequestFailed(f"the server does not answer: {seen.error}")
