"""Queue, time, readers that stop, silence; who may ask, from where, and over what."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from pagoda.base.config import EngineConfig, SchedulerConfig, ServerConfig
from pagoda.base.errors import ConfigError
from pagoda.serve.auth import read_keys
from pagoda.serve.checks import check_files
from pagoda.serve.launch import DEFAULT_QUEUE, _with_bounded_queue
from tests.serve.fakes import Rig
from tests.serve.test_streams import wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def test_a_full_queue_is_429_with_a_time_to_wait(http: httpx.Client) -> None:
    for stream in (False, True):
        answer = http.post(TEXT, json={"prompt": "!full", "stream": stream})
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "RateLimitError"


def test_a_servers_queue_has_an_end() -> None:
    assert _with_bounded_queue(EngineConfig()).scheduler.max_num_queued_reqs == DEFAULT_QUEUE
    for given in (0, -1, 7):
        assert _with_bounded_queue(EngineConfig(scheduler=SchedulerConfig(max_num_queued_reqs=given))).scheduler.max_num_queued_reqs == given


def test_stop_strings_are_counted(http: httpx.Client) -> None:
    assert http.post(TEXT, json={"prompt": "a", "stop": [f"s{i}" for i in range(16)]}).status_code == 200
    error = http.post(TEXT, json={"prompt": "a", "stop": [f"s{i}" for i in range(17)]}).json()["error"]
    assert error["param"] == "stop" and "at most 16" in error["message"]


@pytest.mark.parametrize(("flag", "field", "expected"), [(None, None, None), (None, 3.0, 3.0), (5.0, None, 5.0), (5.0, 3.0, 3.0), (5.0, 30.0, 5.0)])
def test_timeout_is_the_smaller_of_flag_and_field(flag: float | None, field: float | None, expected: float | None) -> None:
    with Rig(request_timeout=flag).make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        assert http.post(TEXT, json={"prompt": "a", "max_tokens": 1, "timeout": field}).status_code == 200
        assert [params.timeout for params in rig.engine.params.values()] == [expected]
        assert http.post(TEXT, json={"prompt": "a", "timeout": -1}).json()["error"]["param"] == "timeout"


def stuck_reader(rig: Rig, **body: Any) -> socket.socket:
    """A client that sends a request and reads nothing."""
    host, port = rig.base_url.removeprefix("http://").split(":")
    raw = json.dumps({"prompt": ["y"] * 200, "n": 20, "max_tokens": 400, "stream": True, "logprobs": 5, **body}).encode()
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return sock


def test_a_reader_that_stops_is_ended_alone() -> None:
    with Rig(stream_stall_timeout=0.4).make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        rig.engine.reply = "x" * 400
        with stuck_reader(rig, request_id="stuck") as sock:
            wait_until(lambda: any("stuck" in key for key in rig.engine.live))
            assert http.post(TEXT, json={"prompt": "a", "max_tokens": 5}, timeout=10).status_code == 200
            wait_until(lambda: rig.state.metrics.own.stalled_streams == 1 and not rig.engine.live, 20)
            wait_until(lambda: not rig.state.active and rig.state.metrics.own.server_load == 0)
            sock.settimeout(5)
            with pytest.raises(ConnectionResetError):
                while sock.recv(1 << 16):
                    pass
                raise AssertionError("the connection was closed, not cut: the server waited for its reader")


def test_silence_is_filled_with_comments() -> None:
    with Rig(sse_keep_alive_interval=0.1).make_ready().running() as rig, httpx.Client(base_url=rig.base_url, timeout=10) as http:
        rig.engine.reply, rig.engine.delay = "ab", 0.35
        text = http.post(TEXT, json={"prompt": "a", "stream": True, "max_tokens": 2}).text
        events = text.split("\n\n")
        assert events[0] == ": keep-alive", "before the first token, too"
        assert 4 <= events.count(": keep-alive") <= 12
        assert [json.loads(event[6:])["choices"][0]["text"] for event in events if event.startswith("data: {")] == ["a", "b"]
        assert events[-2:] == ["data: [DONE]", ""]


def test_an_error_after_a_comment_is_an_event() -> None:
    with Rig(sse_keep_alive_interval=0.05).make_ready().running() as rig, httpx.Client(base_url=rig.base_url, timeout=10) as http:
        rig.engine.delay = 0.2
        answer = http.post(CHAT, json={"messages": [{"role": "user", "content": "!fail"}], "stream": True})
        assert answer.status_code == 200
        *_, error, done, _ = answer.text.split("\n\n")
        assert "not finite" in json.loads(error[6:])["error"]["message"] and done == "data: [DONE]"


def test_without_the_interval_there_are_no_comments() -> None:
    with Rig(sse_keep_alive_interval=0.0, stream_stall_timeout=0.0).make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        rig.engine.reply, rig.engine.delay = "ab", 0.1
        assert ": keep" not in http.post(TEXT, json={"prompt": "a", "stream": True}).text


# ---- who may ask


def test_keys_of_flags_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# the team's\nfirst\n\n  second \n")
    monkeypatch.setenv("PAGODA_API_KEY", "fourth")
    config = ServerConfig(api_key=("third",), api_key_file=str(path))
    assert sorted(read_keys(config)) == ["first", "fourth", "second", "third"]
    rig = Rig(api_key=("third",), api_key_file=str(path)).make_ready()
    with rig.running(), httpx.Client(base_url=rig.base_url) as http:
        for key, status in (("first", 200), ("second", 200), ("third", 200), ("fourth", 200), ("# the team's", 401), ("x", 401)):
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status, key


@pytest.mark.parametrize("content", ["", "# nothing\n\n"])
def test_a_key_file_without_keys_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ConfigError, match="no key"):
        read_keys(ServerConfig(api_key_file=str(path)))


def test_files_are_looked_at_before_anything_starts(tmp_path: Path) -> None:
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "api_key_file"):
        with pytest.raises(ConfigError, match=name.replace("_", "-")):
            check_files(ServerConfig(**{name: str(tmp_path / "none")}))
    (tmp_path / "key").write_text("")
    with pytest.raises(ConfigError, match="--ssl-certfile"):
        check_files(ServerConfig(ssl_keyfile=str(tmp_path / "key")))


# ---- from where


def preflight(http: httpx.Client, origin: str) -> httpx.Response:
    return http.options(CHAT, headers={"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"})


def test_other_origins_get_nothing_by_default(http: httpx.Client) -> None:
    assert "access-control-allow-origin" not in preflight(http, "http://page").headers
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"Origin": "http://page"}).headers


@pytest.mark.parametrize("given", [("http://page",), ('["http://page"]',)])
def test_named_origins_may_ask(given: tuple[str, ...]) -> None:
    with Rig(allowed_origins=given, api_key=("k",)).make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        assert preflight(http, "http://page").headers["access-control-allow-origin"] == "http://page"
        assert preflight(http, "http://other").status_code == 400
        answer = http.get("/v1/models", headers={"Origin": "http://page", "Authorization": "Bearer k"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://page"
        refused = http.get("/v1/models", headers={"Origin": "http://page"})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == "http://page", "the page may read why"


# ---- over what


def test_https(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    trust = ssl.create_default_context(cafile=str(certificate))
    rig = Rig(ssl_keyfile=str(key), ssl_certfile=str(certificate)).make_ready()
    with rig.running(), httpx.Client(base_url=rig.base_url, verify=trust) as http:
        assert rig.base_url.startswith("https://") and http.get("/v1/models").status_code == 200
        stream = http.post(TEXT, json={"prompt": "a", "stream": True, "max_tokens": 3}).text
        assert stream.endswith("data: [DONE]\n\n")
        started = time.monotonic()
        with pytest.raises(httpx.TransportError):
            httpx.get(rig.base_url.replace("https", "http") + "/health", timeout=5)
        assert time.monotonic() - started < 5
