"""--api-server-count: several processes speak HTTP, and from outside they are one server."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from pagoda.serve.figures import FrontFigures, SharedFigures
from pagoda.serve.http_figures import note
from tests.serve.test_server_process import LONG, TEXT, Reading, Toy, toy


def api_processes(server: Toy) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "api_process" in " ".join(child.cmdline())]


def figure(url: str, pattern: str) -> float:
    found = re.search(rf"^{pattern} (\S+)$", httpx.get(url + "/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[Toy]:
    with toy("", processes=2) as running:
        running.wait_for("HTTP is spoken by 2 processes")
        yield running


def test_both_answer_and_metrics_count_all(server: Toy) -> None:
    """40 connections of their own reach both processes; one scrape knows all of them."""
    url, count = server.url, 40
    before = figure(url, r'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}')
    tokens = figure(url, r"vllm:generation_tokens_total{.*}")
    with ThreadPoolExecutor(8) as pool:
        bodies = [LONG | {"max_tokens": 3, "seed": seed} for seed in range(count)]
        answers = list(pool.map(lambda body: httpx.post(url + TEXT, json=body, headers={"X-Request-Id": "same"}).json(), bodies))
    assert all(answer["usage"]["completion_tokens"] == 3 and answer["id"] == "cmpl-same" for answer in answers)
    assert len(api_processes(server)) == 2
    wait_until(lambda: figure(url, r'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}') == before + count)
    assert figure(url, r"vllm:generation_tokens_total{.*}") == tokens + 3 * count
    text = httpx.get(url + "/metrics").text
    assert "process_cpu_seconds_total" not in text, "one process's time is not the server's"


def test_load_is_that_of_both() -> None:
    with toy("slow", processes=2) as slow:
        slow.wait_for("HTTP is spoken by")
        readings = [Reading(slow.url, LONG | {"seed": seed}) for seed in range(6)]
        assert all(reading.has_begun.wait(60) for reading in readings)
        wait_until(lambda: httpx.get(slow.url + "/load").json() == {"server_load": 6})
        slow.process.send_signal(signal.SIGTERM)
        slow.wait_for("stopping")
        slow.process.send_signal(signal.SIGTERM)
        assert slow.end() == 0
        assert {reading.reason() for reading in readings} == {"abort"}


def test_the_queue_has_one_end() -> None:
    """max_num_seqs of the toy run, one may wait, whichever process a request comes to."""
    with toy("slow", processes=2, settings=("max_num_queued_reqs=1",)) as server:
        server.wait_for("HTTP is spoken by")
        with ThreadPoolExecutor(24) as pool:
            statuses = list(pool.map(lambda seed: httpx.post(server.url + TEXT, json=LONG | {"max_tokens": 20, "seed": seed}, timeout=60).status_code, range(24)))
        assert set(statuses) == {200, 429}
        assert figure(server.url, r'vllm:admission_rejections_total{.*reason="QueueFull"}') == statuses.count(429)


def test_a_dead_process_is_replaced_and_leaves_nothing() -> None:
    with toy("slow", processes=2) as server:
        server.wait_for("HTTP is spoken by")
        url = server.url
        readings = [Reading(url, LONG | {"seed": seed, "max_tokens": 60}) for seed in range(8)]
        assert all(reading.has_begun.wait(30) for reading in readings), [(len(r.events), r.was_cut, r.is_alive()) for r in readings]
        wait_until(lambda: figure(url, r"pagoda:server_load{.*}") == 8)
        time.sleep(0.1)  # until its figures are written
        victim = api_processes(server)[0]
        others = [process.pid for process in api_processes(server)[1:]]
        os.kill(victim.pid, signal.SIGKILL)
        server.wait_for("was ended by SIGKILL; its requests are lost, and another process takes its place")
        wait_until(lambda: len(api_processes(server)) == 2)
        assert others[0] in [process.pid for process in api_processes(server)]
        for reading in readings:
            reading.join(15)
        whole = [reading for reading in readings if not reading.was_cut]
        assert all(reading.events[-1] == "[DONE]" for reading in whole)
        wait_until(lambda: figure(url, r"pagoda:server_load{.*}") == 0)
        wait_until(lambda: figure(url, r"vllm:num_requests_running{.*}") == 0)
        assert figure(url, r'vllm:request_success_total{.*finished_reason="length".*}') == len(whole)
        assert figure(url, r'vllm:request_success_total{.*finished_reason="abort".*}') == 8 - len(whole)
        statuses = {httpx.post(url + TEXT, json=LONG | {"max_tokens": 1}, timeout=20).status_code for _ in range(12)}
        assert statuses == {200}, "its socket waited for its successor"
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0


def test_processes_that_keep_dying_end_the_server() -> None:
    with toy("", processes=2) as server:
        server.wait_for("HTTP is spoken by")
        for number in range(5):
            wait_until(lambda: len(api_processes(server)) == 2)
            statuses: set[int] = set()
            while len(statuses) != 1 or 503 in statuses:  # until both say that they are ready
                statuses = {httpx.get(server.url + "/ready", timeout=60).status_code for _ in range(12)}
            wait_until(lambda: len(api_processes(server)) == 2)
            api_processes(server)[-1].kill()
            if number < 4:
                wait_until(lambda wanted=number + 1: sum("SIGKILL" in line for line in server.lines) == wanted)
        assert server.end() == 1
        assert "5 API processes died within a minute" in server.lines[-1]


def test_they_end_with_the_main_process() -> None:
    with toy("", processes=2) as server:
        server.wait_for("HTTP is spoken by")
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) == 3
        server.process.kill()
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive


def test_engine_death_shows_in_both() -> None:
    with toy("kill", processes=2) as server:
        url = server.url
        reading = Reading(url, LONG)
        reading.join(10)
        assert reading.events[-1] == "[DONE]" and "SIGKILL" in json.loads(reading.events[-2])["error"]["message"]
        wait_until(lambda: {httpx.get(url + "/health").status_code for _ in range(10)} == {503})
        assert not any("Engine 000" in line for line in server.lines), "the news does not wait for the line of figures"
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_errors_of_loading_are_one_line() -> None:
    with toy("full", processes=2) as server:
        assert server.end() == 1
        assert server.lines == ["toy: error: the toy does not fit; lower --max-model-len"]


def test_a_taken_port_is_refused(server: Toy) -> None:
    port = int(server.url.rpartition(":")[2])
    with toy("", port=port, processes=2) as second:
        assert second.end() == 1 and "is in use" in second.lines[0]


@pytest.mark.parametrize(("processes", "settings", "words"), [(0, (), "must be at least 1"), (2, ("record_arrivals=x.jsonl",), "one process")])
def test_what_cannot_be_had_is_refused(processes: int, settings: tuple[str, ...], words: str) -> None:
    with toy("", processes=processes, settings=settings) as server:
        assert server.end() == 1 and words in server.lines[0]


def test_a_unix_socket_is_shared(tmp_path: Path) -> None:
    path = tmp_path / "pagoda.sock"
    with toy("", uds=str(path), processes=2) as server:
        server.wait_for("HTTP is spoken by")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as http:
            assert http.post(TEXT, json=LONG | {"max_tokens": 2}).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0 and not path.exists()


def test_figures_of_the_dead_stay_without_their_gauges(tmp_path: Path) -> None:
    mine, theirs = FrontFigures(server_load=1), FrontFigures(server_load=2, stalled_streams=3, tool_calls={("auto", "none"): 2})
    for figures in (mine, theirs):
        note(figures, "/x", "GET", 200, 0.2)
    first, second = SharedFigures(str(tmp_path), 1, mine), SharedFigures(str(tmp_path), 2, theirs)
    first.write()
    second.write()
    found = mine.plus(first.others())
    assert (found.server_load, found.stalled_streams, found.http_requests) == (3, 3, {("/x", "GET", "2xx"): 2})
    assert found.http_seconds["/x", "GET"].count == 2 and found.tool_calls == {("auto", "none"): 2}
    assert mine.server_load == 1 and mine.http_requests == {("/x", "GET", "2xx"): 1}
    SharedFigures.bury(str(tmp_path), 2)
    assert mine.plus(first.others()).server_load == 1 and mine.plus(first.others()).stalled_streams == 3
