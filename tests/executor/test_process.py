"""The engine process over its channel: the real core on a toy worker, and every way it can end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pagoda.base.config import EngineConfig
from pagoda.base.errors import EngineDead, OutOfMemory
from pagoda.base.types import EngineOutput, FinishReason, GenerateRequest, SamplingParams
from pagoda.executor.process import EngineProcess, ProcessClient
from tests.engine.fake_executor import toy_generate
from tests.executor.builders import MAX_MODEL_LEN, toy_config

BUILDER = "tests.executor.builders:build"


@asynccontextmanager
async def client_of(config: EngineConfig, **more: Any) -> AsyncIterator[ProcessClient]:
    client = ProcessClient(EngineProcess.start(config, builder=BUILDER, log_level="error"), **more)
    try:
        yield client
    finally:
        client.close()


def request(name: str, num_prompt: int = 20, **params: Any) -> GenerateRequest:
    values = {"max_tokens": 8, "seed": 1, **params}
    return GenerateRequest(request_id=name, prompt_token_ids=[(i * 7 + len(name)) % 50 for i in range(num_prompt)], params=SamplingParams(**values))


async def collect(client: ProcessClient, num_ends: int) -> dict[tuple[str, int], list[EngineOutput]]:
    """Outputs until so many samples have ended, and a moment longer: nobody ends twice."""
    found: dict[tuple[str, int], list[EngineOutput]] = {}
    while sum(outs[-1].finish_reason is not None for outs in found.values()) < num_ends:
        for output in await asyncio.wait_for(client.get_outputs(), 10):
            found.setdefault((output.request_id, output.index), []).append(output)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.get_outputs(), 0.05)
    assert all([o.finish_reason is not None for o in outs].count(True) == 1 for outs in found.values())
    return found


async def test_tokens_cross_the_wire() -> None:
    async with client_of(toy_config()) as client:
        info = await client.wait_ready()
        assert info.config.model.max_model_len == MAX_MODEL_LEN and info.facts.architecture == "toy" and info.report == ["a toy"]
        asked = [request("a", logprobs=0), request("bb", 100, max_tokens=30), request("ccc", n=3, temperature=0.5)]
        for one in asked:
            client.submit(one)
        found = await collect(client, 5)
        for one in asked:
            for i in range(one.params.n):
                wanted, reason = toy_generate(one, one.params.clone(n=1, seed=1 + i), MAX_MODEL_LEN)
                outs = found[one.request_id, i]
                assert [t for out in outs for t in out.new_token_ids] == wanted and outs[-1].finish_reason == reason
        assert found["a", 0][0].logprobs is not None
        client.check_health()


async def test_stats_and_calls() -> None:
    async with client_of(toy_config()) as client:
        await client.wait_ready()
        client.submit(request("a"))
        await collect(client, 1)
        stats = await client.stats()
        assert stats.generation_tokens == 8 and stats.prompt_tokens == 20 and stats.request_success == {"length": 1}
        assert stats.histograms["time_to_first_token_seconds"].count == 1
        assert await client.call("reset_prefix_cache") is True
        assert await client.call("check_integrity") is None


async def test_bad_requests_come_back_as_outputs() -> None:
    async with client_of(toy_config()) as client:
        await client.wait_ready()
        client.submit(request("long", 300))
        client.submit(request("good"))
        found = await collect(client, 2)
        end = found["long", 0][-1]
        assert (end.finish_reason, end.error_type) == (FinishReason.ERROR, "InvalidRequest") and end.error
        assert found["good", 0][-1].finish_reason == FinishReason.LENGTH


async def test_abort() -> None:
    async with client_of(toy_config("toy:slow")) as client:
        await client.wait_ready()
        client.submit(request("a", max_tokens=200))
        client.submit(request("b", max_tokens=200, n=2, temperature=0.5))
        await asyncio.wait_for(client.get_outputs(), 10)
        client.abort(["a", ("b", 1), "unknown"])
        client.abort([("b", 0)], FinishReason.STOP)
        found = await collect(client, 3)
        ends = {key: outs[-1].finish_reason for key, outs in found.items()}
        assert ends == {("a", 0): "abort", ("b", 1): "abort", ("b", 0): "stop"}
        await client.call("check_integrity")


@pytest.mark.parametrize("mood", ["kill", "bug"])
async def test_death_ends_every_request_once(mood: str, capfd: pytest.CaptureFixture[str]) -> None:
    async with client_of(toy_config(f"toy:{mood}")) as client:
        await client.wait_ready()
        client.submit(request("a", max_tokens=50))
        client.submit(request("b", max_tokens=50, n=3, temperature=0.5))
        found = await collect(client, 4)
        assert {outs[-1].error_type for outs in found.values()} == {"EngineDead"}
        assert not client.is_alive
        with pytest.raises(EngineDead):
            client.check_health()
        with pytest.raises(EngineDead):
            client.submit(request("c"))
        with pytest.raises(EngineDead):
            await client.call("stats")
        client.abort(["a"])
        if mood == "kill":
            assert "SIGKILL" in (found["a", 0][-1].error or "")


async def test_a_failed_step_fails_its_requests_only() -> None:
    async with client_of(toy_config("toy:fail")) as client:
        await client.wait_ready()
        client.submit(request("a"))
        found = await collect(client, 1)
        assert found["a", 0][-1].finish_reason == FinishReason.ERROR and client.is_alive
        client.check_health()
        await client.call("check_integrity")


async def test_builder_errors_reach_the_parent() -> None:
    async with client_of(toy_config("toy:full")) as client:
        with pytest.raises(OutOfMemory, match="--max-model-len"):
            await asyncio.wait_for(client.wait_ready(), 10)
    async with client_of(toy_config("toy:broken")) as client:
        with pytest.raises(EngineDead, match="a bug in the builder"):
            await asyncio.wait_for(client.wait_ready(), 10)


async def test_health_while_loading_and_when_stalled() -> None:
    now = [100.0]
    async with client_of(toy_config("toy:hang"), clock=lambda: now[0]) as client:
        with pytest.raises(EngineDead, match="loading"):
            client.check_health()
        await client.wait_ready()
        client.check_health()
        client.submit(request("a"))
        num_outputs = 0
        while num_outputs < 3:
            num_outputs += len(await asyncio.wait_for(client.get_outputs(), 10))
        now[0] += 9.9
        client.check_health()
        now[0] += 0.2
        with pytest.raises(EngineDead, match="no progress for 10 s"):
            client.check_health()
        os.kill(client._process.pid, signal.SIGKILL)  # it would not listen to a request to stop


async def test_an_idle_engine_answers_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.executor.process._PING_SECONDS", 0.02)
    heard: list[float] = []
    async with client_of(toy_config()) as client:
        await client.wait_ready()
        for _ in range(3):
            heard.append(client._last_heard)
            await asyncio.sleep(0.1)
        assert heard[0] < heard[1] < heard[2]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_the_engine_dies_with_its_parent() -> None:
    code = (
        f"import asyncio, sys, time; sys.path[:] = {sys.path!r}\n"
        "from pagoda.executor.process import EngineProcess, ProcessClient\n"
        "from tests.executor.builders import toy_config\n"
        "async def main():\n"
        f"    process = EngineProcess.start(toy_config(), builder={BUILDER!r}, log_level='error')\n"
        "    await ProcessClient(process).wait_ready()\n"
        "    print(process.pid, process._directory, flush=True)\n"
        "    time.sleep(100)\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        words = parent.stdout.readline().split()
        pid, directory = int(words[0]), Path(words[1])
        os.kill(pid, signal.SIGINT)  # a terminal's Ctrl-C and a service's stop reach it too: it waits for its parent's decision
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
        assert is_running(pid)
    finally:
        parent.kill()
        parent.communicate()
    end = time.monotonic() + 5
    while is_running(pid):
        assert time.monotonic() < end, "the engine process outlived its parent"
        time.sleep(0.02)
    assert not directory.exists()


async def test_close_ends_the_process_and_its_files() -> None:
    process = EngineProcess.start(toy_config(), builder=BUILDER, log_level="error")
    client = ProcessClient(process)
    await client.wait_ready()
    directory = process._directory
    assert Path(directory).stat().st_mode & 0o077 == 0, "only this user may talk to the engine"
    client.close()
    client.close()
    assert not process.is_alive and not Path(directory).exists()


async def test_a_process_that_dies_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.executor.process._CODE", "raise SystemExit(3)  # {path}")
    async with client_of(toy_config()) as client:
        with pytest.raises(EngineDead, match="status 3"):
            await asyncio.wait_for(client.wait_ready(), 10)
