"""The measuring client against our server over a real socket, and the arithmetic of its figures."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from pagoda.base.errors import ConfigError, RequestFailed
from pagoda.bench.client import Backend, Client, Exchange
from pagoda.bench.serve import Options, arrival_times, summary
from tests.serve.fakes import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(api_key=["key"]).make_ready().running() as running:
        running.engine.delay = 0.002
        yield running


def _send(rig: Rig, prompt: str, backend: Backend = "openai", *, key: str = "key", **fields: object) -> Exchange:
    async def go() -> Exchange:
        client = Client(rig.base_url, backend=backend, api_key=key)
        try:
            return await client.send(prompt, 2, **fields)
        finally:
            await client.close()

    return asyncio.run(go())


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_an_exchange(rig: Rig, backend: Backend) -> None:
    seen = _send(rig, "hi", backend, max_tokens=12)
    assert seen.error == "" and seen.text == "Hello wörld"  # 12 bytes, 11 characters
    assert seen.output_len == 12 and len(seen.itls) == len(seen.text) - 1
    assert 0 < seen.ttft < seen.latency
    assert seen.ttft + sum(seen.itls) == pytest.approx(seen.latency)
    assert seen.tpot == pytest.approx((seen.latency - seen.ttft) / 11)


@pytest.mark.parametrize(
    ("prompt", "key", "error"),
    [("hi", "wrong", "status 401"), ("!fail", "key", "not finite"), ("!full", "key", "status 429"), ("!bug", "key", "internal error")],
)
def test_failures_are_noted(rig: Rig, prompt: str, key: str, error: str) -> None:
    assert error in _send(rig, prompt, key=key, max_tokens=12).error


def test_no_server() -> None:
    async def go() -> None:
        client = Client("http://127.0.0.1:1", backend="openai", model="m")
        seen = await client.send("hi", 1)
        assert "ConnectError" in seen.error and not seen.is_ok
        with pytest.raises(RequestFailed, match="does not answer with a model"):
            await client.first_model()
        await client.close()

    asyncio.run(go())


def _exchange(ttft: float, itls: list[float], error: str = "") -> Exchange:
    return Exchange(10, ttft, itls, ttft + sum(itls), len(itls) + 1, error=error)


def test_figures() -> None:
    seen = [_exchange(0.1, [0.01, 0.03]), _exchange(0.3, [0.02]), _exchange(0.2, []), _exchange(9.0, [9.0], "broke")]
    rows = {row.key: row.value for row in summary(seen, 2.0, percents=[100], goals={"ttft": 250.0, "e2el": 150.0})}
    assert (rows["completed"], rows["failed"], rows["total_input_tokens"], rows["total_output_tokens"]) == (3, 1, 30, 6)
    assert (rows["request_throughput"], rows["output_throughput"], rows["total_token_throughput"]) == (1.5, 3.0, 18.0)
    assert rows["mean_ttft_ms"] == pytest.approx(200) and rows["median_ttft_ms"] == pytest.approx(200)
    assert rows["p100_ttft_ms"] == pytest.approx(300)
    assert rows["mean_tpot_ms"] == pytest.approx(20)  # the answer of one token has none
    assert rows["mean_itl_ms"] == pytest.approx(20) and rows["p100_itl_ms"] == pytest.approx(30)
    assert rows["mean_e2el_ms"] == pytest.approx((140 + 320 + 200) / 3)
    assert rows["request_goodput"] == 0.5


def test_figures_of_nothing() -> None:
    rows = {row.key: row.value for row in summary([_exchange(1, [], "broke")], 1.0, percents=[99], goals={})}
    assert rows["completed"] == 0 and rows["p99_ttft_ms"] == 0.0


def test_arrivals() -> None:
    assert arrival_times(3, Options(), seed=0) == [0.0] * 3
    for burstiness in (0.5, 1.0, 4.0):
        options = Options(request_rate=5.0, burstiness=burstiness)
        times = arrival_times(4000, options, seed=3)
        assert times == arrival_times(4000, options, seed=3) != arrival_times(4000, options, seed=4)
        gaps = np.diff(times)
        assert times[0] == 0 and gaps.min() >= 0
        assert gaps.mean() == pytest.approx(0.2, rel=0.1)
        assert gaps.std() == pytest.approx(0.2 / burstiness**0.5, rel=0.1)


@pytest.mark.parametrize("change", [{"request_rate": 0.0}, {"burstiness": -1.0, "request_rate": 1.0}])
def test_arrivals_that_cannot_be(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        arrival_times(3, dataclasses.replace(Options(), **change), seed=0)  # type: ignore[arg-type]
