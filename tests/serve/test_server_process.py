"""The whole server as a process: it starts, drains, is told no, loses its engine."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = "/v1/completions"
LONG = {"prompt": "abc", "max_tokens": 200, "ignore_eos": True, "seed": 1}


class Toy:
    """A server process; what it writes is read in a thread."""

    def __init__(
        self, mood: str, timeout: float = 20.0, port: int = 0, uds: str = "", processes: int = 1, settings: tuple[str, ...] = ()
    ) -> None:
        args = [sys.executable, "-m", "tests.serve.toy_server", str(port), mood, str(timeout), uds, str(processes), *settings]
        self.process = subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str, seconds: float = 60.0) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            time.sleep(0.01)
        raise AssertionError(f"no line like {pattern!r} in {self.lines}")

    @property
    def url(self) -> str:
        return self.wait_for(r"Serving toy on (http://\S+)").group(1)

    def end(self, seconds: float = 60.0) -> int:
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status


@contextlib.contextmanager
def toy(*args: object, **kwargs: object) -> Iterator[Toy]:
    server = Toy(*args, **kwargs)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


class Reading(threading.Thread):
    """A client in a thread: what it read, and how it ended."""

    def __init__(self, url: str, body: dict[str, object]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, body
        self.events: list[str] = []
        self.has_begun = threading.Event()
        self.was_cut = False
        self.start()

    def run(self) -> None:
        try:
            self._read()
        except httpx.TransportError:
            self.was_cut = True

    def _read(self) -> None:
        with httpx.stream("POST", self._url + TEXT, json=self._body | {"stream": True}, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line[6:])
                    self.has_begun.set()

    def reason(self) -> str | None:
        self.join(15)
        assert not self.is_alive() and self.events[-1] == "[DONE]"
        reasons = [json.loads(event)["choices"][0]["finish_reason"] for event in self.events[:-1]]
        assert all(reason is None for reason in reasons[:-1])
        return reasons[-1]


def test_it_announces_itself_answers_and_ends() -> None:
    with toy("") as server:
        url = server.url
        assert server.wait_for("^a toy$") and server.wait_for("POST /v1/chat/completions")
        line = server.wait_for(r"^  (curl .*)$").group(1)
        answer = subprocess.run(["sh", "-c", line + " -s"], capture_output=True, text=True, timeout=10)
        assert json.loads(answer.stdout)["object"] == "chat.completion"
        assert httpx.get(url + "/health").status_code == 200
        assert "vllm:generation_tokens_total" in httpx.get(url + "/metrics").text
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0


def test_sigterm_drains() -> None:
    """What runs is finished, new requests are refused (503, then no connection), the exit code is 0."""
    with toy("slow") as server:
        url = server.url
        reading = Reading(url, LONG | {"max_tokens": 50})
        assert reading.has_begun.wait(10)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("stopping: 1 requests may finish")
        with pytest.raises(httpx.TransportError):
            for _ in range(100):
                assert httpx.post(url + TEXT, json=LONG | {"max_tokens": 1}, timeout=5).status_code == 503
                time.sleep(0.01)
        assert reading.reason() == "length"
        assert server.end() == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_aborts_what_does_not_finish_in_time(signals: int) -> None:
    """After --shutdown-timeout, or at once when told twice; each stream gets its end."""
    with toy("slow", 0.3 if signals == 1 else 60.0) as server:
        readings = [Reading(server.url, LONG | {"seed": i}) for i in range(3)]
        assert all(reading.has_begun.wait(10) for reading in readings)
        server.process.send_signal(signal.SIGTERM)
        if signals == 2:
            server.wait_for("stopping:")
            server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert [reading.reason() for reading in readings] == ["abort"] * 3


def test_503_while_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with toy("late", port=port) as server:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 10
        seen: list[int] = []
        while seen[-1:] != [200]:
            assert time.monotonic() < end
            with contextlib.suppress(httpx.ConnectError, httpx.ReadError):
                seen.append(httpx.get(url + "/health", timeout=5).status_code)
        assert 503 in seen and set(seen) == {503, 200}
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with toy("", port=port) as server:
            assert server.end() == 1
            assert server.lines == [f"toy: error: port {port} on 127.0.0.1 is in use; stop what listens there, or choose another with --port"]


def test_a_model_that_does_not_fit_is_one_line() -> None:
    with toy("full") as server:
        assert server.end() == 1
        assert server.lines == ["toy: error: the toy does not fit; lower --max-model-len"]


def test_engine_death_ends_requests_and_shows_in_health() -> None:
    with toy("kill") as server:
        url = server.url
        reading = Reading(url, LONG)
        reading.join(10)
        assert reading.events[-1] == "[DONE]" and "SIGKILL" in json.loads(reading.events[-2])["error"]["message"]
        for path in ("/health", "/ready"):
            answer = httpx.get(url + path)
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead"
        assert httpx.post(url + TEXT, json=LONG).status_code == 503
        assert httpx.get(url + "/metrics").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "pagoda.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with toy("", uds=str(path)) as server:
        server.wait_for("Serving toy on unix:")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as http:
            assert http.get("/health").status_code == 200
        with toy("", uds=str(path)) as second:
            assert second.end() == 1 and "another server listens" in second.lines[0]
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0 and not path.exists()


def test_a_file_is_not_taken_for_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("x")
    with toy("", uds=str(path)) as server:
        assert server.end() == 1 and "cannot listen" in server.lines[0]
    assert path.read_text() == "x"
