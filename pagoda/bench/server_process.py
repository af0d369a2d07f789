"""A `pagoda serve` of our own: a fresh process on a free port, stopped when the measurement ends."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from pagoda.base.config import EngineConfig, changed_fields
from pagoda.base.errors import RequestFailed

__all__ = ["ServerProcess", "command", "running_server", "write_config"]

_POLL_SECONDS = 0.01
_STOP_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class ServerProcess:
    """A server that takes requests. Times are of `time.perf_counter`."""

    base_url: str
    launched_at: float
    ready_at: float


def command(*words: str) -> list[str]:
    """The `pagoda` of this very interpreter and source."""
    return [sys.executable, "-m", "pagoda.cli", *words]


def write_config(config: EngineConfig, folder: Path) -> Path:
    """A file for `--config` that says what `config` says."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(changed_fields(config)), encoding="utf-8")  # JSON is YAML
    return path


@contextmanager
def running_server(config: EngineConfig, *, timeout: float = 600.0) -> Iterator[ServerProcess]:
    """Yields when /ready answers 200. RequestFailed with the server's last words when it does not get there."""
    with tempfile.TemporaryDirectory(prefix="pagoda-bench-") as folder:
        config_file, log_file = write_config(config, Path(folder)), Path(folder) / "log"
        port = _free_port()
        words = command("serve", "--config", str(config_file), "--port", str(port), "--disable-log-stats")
        with open(log_file, "wb") as log:
            launched_at = time.perf_counter()
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            try:
                base_url = f"http://127.0.0.1:{port}"
                ready_at = _wait_ready(base_url, process, log_file, launched_at + timeout)
                yield ServerProcess(base_url, launched_at, ready_at)
            finally:
                _stop(process)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_ready(base_url: str, process: subprocess.Popen[bytes], log_file: Path, deadline: float) -> float:
    with httpx.Client(base_url=base_url, timeout=5.0, trust_env=False) as client:
        while time.perf_counter() < deadline:
            if process.poll() is not None:
                raise RequestFailed(f"the server ended with status {process.returncode}:\n{_tail(log_file)}")
            try:
                if client.get("/ready").status_code == 200:
                    return time.perf_counter()
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(_POLL_SECONDS)
    raise RequestFailed(f"the server was not ready in time:\n{_tail(log_file)}")


def _tail(log_file: Path) -> str:
    return "\n".join(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
