"""A server of the default model, and one client's script run against it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.clients.catalog import Client
from tests.clients.environments import CACHE, ROOT, command, model_folder

__all__ = ["Outcome", "run_client", "running_server"]

_MODEL = "SmolLM2-135M-Instruct"
_START_SECONDS, _STOP_SECONDS = 180.0, 30.0


@dataclass(frozen=True)
class Outcome:
    """What one client did."""

    version: str
    done: tuple[str, ...]
    failed: tuple[str, ...]
    output: str
    """All it said, for a reader who wants to know why."""


@contextlib.contextmanager
def running_server(log: Path, flags: Sequence[str] = ()) -> Iterator[str]:
    """The URL of `pagoda serve`, the default model's unless `flags` say otherwise. AssertionError where it does not start, or ends badly."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "pagoda.cli", "serve", *flags, "--port", "0", "--kv-cache-memory-bytes", "256M"]
    with open(log, "wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        yield _url(process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(_STOP_SECONDS) == 0, f"the server ended with status {process.returncode}: see {log}"
    finally:
        process.kill()
        process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"Serving \S+ on (http://\S+)", log.read_text(encoding="utf-8", errors="replace")):
            return found.group(1)
        time.sleep(0.05)
    raise AssertionError("the server did not start:\n" + log.read_text(encoding="utf-8", errors="replace"))


def run_client(client: Client, server: str, model: Path) -> Outcome:
    """One client's script, to its end. Unreachable where it cannot be installed; a script that takes too long is a failure."""
    words = command(client)
    work = CACHE / "work" / client.script.partition(".")[0]
    work.mkdir(parents=True, exist_ok=True)
    folder = str(model_folder(model))
    words += [server, _MODEL, folder, str(work)]
    if not client.compares:
        return _run_script(words, client.timeout_s, work)
    flags = [folder, "--dtype", "float32", "--kv-cache-dtype", "float32", "--max-model-len", "2048", "--served-model-name", _MODEL]
    with running_server(work / "server.log", flags) as second:
        return _run_script([*words, second], client.timeout_s, work)


def _run_script(words: Sequence[str], timeout_s: float, work: Path) -> Outcome:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(CACHE / "hf")}
    environment = {**os.environ, **offline, "PYTHONDONTWRITEBYTECODE": "1", "OPENAI_API_KEY": "none"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=work, start_new_session=True, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        is_late = False
    except subprocess.TimeoutExpired:
        _end_group(process)
        output, _ = process.communicate()
        is_late = True
    finally:
        _end_group(process)
    (work / "output.log").write_text(output, encoding="utf-8")
    failed = re.findall(r"^FAILED (.+)$", output, re.M)
    if is_late:
        failed.append(f"took more than {timeout_s:.0f} s")
    elif process.returncode and not failed:
        failed.append(f"ended with status {process.returncode}")
    done = re.findall(r"^ok (.+)$", output, re.M)
    if not done and not failed:
        failed.append("did nothing")
    found = re.search(r"^version (\S+) (\S+)$", output, re.M)
    return Outcome(f"{found[1]} {found[2]}" if found else "?", tuple(done), tuple(failed), output)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ends what a script left behind: its process leads a group, and a client that is stopped may leave workers in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
