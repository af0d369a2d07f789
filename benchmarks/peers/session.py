"""A worker process as the harness sees it, and the processor time that others took meanwhile.

Between its turns a worker's whole process group is stopped, so that an idle engine that spins costs the others nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT, PeerAbsent

__all__ = ["Others", "Worker", "end_group", "peak_mib", "tree_of", "wait_quiet"]

_MOMENT, _QUIET_CORES = 0.25, 0.1
_HZ = os.sysconf("SC_CLK_TCK")


class Worker:
    """One engine. Start-up failures are PeerAbsent, with the last words of its log."""

    def __init__(self, name: str, words: Sequence[str], env: dict[str, str], log: Path, *, timeout: float = 400.0) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.name, self._log, self.launched_at = name, log, time.perf_counter()
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env, cwd=ROOT, start_new_session=True
            )
        self._read(timeout)

    def ask(self, question: dict[str, Any], *, timeout: float = 600.0) -> dict[str, Any]:
        """The answer. RuntimeError when the worker dies or takes too long."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        self._process.stdin.flush()
        try:
            return self._read(timeout)
        except PeerAbsent as error:
            raise RuntimeError(str(error)) from None

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def peak_mib(self) -> float:
        return peak_mib(self._process.pid)

    def close(self) -> None:
        end_group(self._process)

    def _read(self, timeout: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.perf_counter() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not selector.select(timeout=1.0):
                if time.perf_counter() > deadline:
                    self.close()
                    raise PeerAbsent(f"{self.name} gave no answer in {timeout:.0f} s; log: {self._log.relative_to(ROOT)}")
        line = self._process.stdout.readline()
        if not line:
            self.close()
            tail = [text for text in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()][-2:]
            raise PeerAbsent(f"{self.name} ended: {' / '.join(tail)[-300:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads its own group, and all of the group."""
    for number in (signal.SIGCONT, signal.SIGTERM):
        _signal_group(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):  # what is left is killed below
        process.wait(10.0)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # it has ended


def tree_of(root: int) -> list[int]:
    """A process and its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        if fields := _stat(int(entry)):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def peak_mib(root: int) -> float:
    """Summed peak resident memory of a process tree; pages that several of its processes share are counted in each."""
    total = 0
    for pid in tree_of(root):
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue  # it has just ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return total / 1024


class Others:
    """Cores that processes outside our own tree keep busy, on average since this was made."""

    def __init__(self) -> None:
        self._busy, self._at = _busy_outside(), time.perf_counter()

    def cores(self) -> float:
        return max(0.0, _busy_outside() - self._busy) / max(time.perf_counter() - self._at, 1e-3)


def wait_quiet(limit_s: float) -> None:
    """Until others leave the cores alone for a moment, or the limit has passed. Our engines are stopped meanwhile."""
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        others = Others()
        time.sleep(_MOMENT)
        if others.cores() < _QUIET_CORES:
            return


def _busy_outside() -> float:
    """Seconds of all processors so far, less our tree's, living and reaped."""
    with open("/proc/stat", encoding="ascii") as file:
        values = [int(text) for text in file.readline().split()[1:9]]
    ours = sum(sum(map(int, fields[11:15])) for pid in tree_of(os.getpid()) if (fields := _stat(pid)))
    return (sum(values) - values[3] - values[4] - ours) / _HZ


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
    except OSError:
        return None
