"""Streaming: kinds of output, leaving early, errors, death."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from pagoda.api.async_engine import AsyncEngine
from pagoda.api.processor import Processor
from pagoda.base.errors import DeadlineExceeded, EngineDead, InvalidRequest, QueueFull, RequestFailed
from pagoda.base.types import RequestOutput, RequestOutputKind, SamplingParams
from pagoda.engine.client import ThreadClient
from tests.api.fakes import EOS, FakeEngine

DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


@asynccontextmanager
async def running(max_pending_nbytes: int | None = None, **kwargs: Any) -> AsyncIterator[tuple[AsyncEngine, FakeEngine]]:
    fake = FakeEngine(**kwargs)
    engine = AsyncEngine(
        ThreadClient(fake.core),
        Processor(fake.config, fake.facts, fake.front.tokenizer, eos_token_ids=[EOS]),
        on_shutdown=fake.close,
        max_pending_nbytes=max_pending_nbytes,
    )
    try:
        yield engine, fake
    finally:
        await engine.shutdown()
        assert fake.is_closed


async def idle(engine: AsyncEngine, fake: FakeEngine) -> None:
    """Until the core has nothing left; then it must be whole."""
    async with asyncio.timeout(5):
        while await engine._client.call("has_work") is not False:
            await asyncio.sleep(0.001)
    await engine._client.call("check_integrity")
    assert (await engine.stats()).kv_cache_usage_perc == 0.0


async def collect(engine: AsyncEngine, *args: Any, **kwargs: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(*args, **kwargs)]


def params(kind: RequestOutputKind = DELTA, **more: Any) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "max_tokens": None, "output_kind": kind, **more})


async def test_deltas_add_up_and_the_end_comes_once() -> None:
    async with running() as (engine, fake):
        outputs = await collect(engine, "héllo", params(logprobs=1), "r")
        assert "".join(o.outputs[0].text for o in outputs) == "HÉLLO 1"
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
        tokens = [t for o in outputs for t in o.outputs[0].token_ids]
        assert fake.front.tokenizer.decode(tokens) == "HÉLLO 1" and tokens[-1] == EOS
        assert sum(len(o.outputs[0].logprobs) for o in outputs) == len(tokens)
        assert outputs[-1].outputs[0].cumulative_logprob == pytest.approx(-0.5 * len(tokens))
        assert {o.request_id for o in outputs} == {"r"} and outputs[-1].metrics is not None
        await idle(engine, fake)


async def test_cumulative_outputs_grow_and_are_not_changed_later() -> None:
    async with running() as (engine, _):
        outputs = await collect(engine, "hello", params(CUMULATIVE, n=2, logprobs=0))
        for earlier, later in itertools.pairwise(outputs):
            for a, b in zip(earlier.outputs, later.outputs):
                assert b.text.startswith(a.text) and len(a.token_ids) == len(a.logprobs) <= len(b.token_ids)
        assert [s.text for s in outputs[-1].outputs] == ["HELLO 1", "HELLO 2"]
        assert len(outputs[0].outputs[0].token_ids) < len(outputs[-1].outputs[0].token_ids)


async def test_final_only_is_one_output() -> None:
    async with running() as (engine, _):
        (output,) = await collect(engine, "hello", params(FINAL, n=3))
        assert [s.text for s in output.outputs] == ["HELLO 1", "HELLO 2", "HELLO 3"] and output.finished


async def test_a_slow_reader_gets_everything_in_fewer_outputs() -> None:
    async with running() as (engine, fake):
        texts = []
        async for output in engine.generate("hello", params()):
            texts.append(output.outputs[0].text)
            async with asyncio.timeout(5):
                while not output.finished and await engine._client.call("has_work"):
                    await asyncio.sleep(0.001)
        assert "".join(texts) == "HELLO 1" and len(texts) == 2
        await idle(engine, fake)


async def test_stop_string_is_not_streamed_and_frees_the_request() -> None:
    async with running(script=lambda prompt, seed: "one ENx two END three" + "." * 100) as (engine, fake):
        outputs = await collect(engine, "a", params(stop=["END"]))
        texts = [o.outputs[0].text for o in outputs]
        assert "".join(texts) == "one ENx two "
        assert (outputs[-1].outputs[0].finish_reason, outputs[-1].outputs[0].stop_reason) == ("stop", "END")
        metrics = outputs[-1].metrics  # though the core learns of the end only now
        assert metrics is not None and 0 < metrics.scheduled_time < metrics.first_token_time < metrics.last_token_time
        await idle(engine, fake)
        assert (await engine.stats()).request_success == {"stop": 1}


@pytest.mark.parametrize("how", ["close", "cancel"])
async def test_leaving_early_frees_the_blocks(how: str) -> None:
    async with running(script=lambda prompt, seed: "x" * 190) as (engine, fake):
        fake.executor.delay = 0.005
        if how == "close":
            async with aclosing(engine.generate("a", params(), "r")) as outputs:
                await anext(outputs)
        else:
            task = asyncio.create_task(collect(engine, "a", params(), "r"))
            await asyncio.sleep(0.03)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await idle(engine, fake)
        assert (await engine.stats()).request_success == {"abort": 1}


async def test_abort_by_id_ends_with_one_output() -> None:
    async with running(script=lambda prompt, seed: "x" * 190) as (engine, fake):
        fake.executor.delay = 0.005
        outputs = []
        async for output in engine.generate("a", params(n=2), "r"):
            outputs.append(output)
            await engine.abort("r")
        assert outputs[-1].finished and {s.finish_reason for s in outputs[-1].outputs} == {"abort"}
        await engine.abort("nobody")
        await idle(engine, fake)


async def test_errors_of_one_request_are_raised_in_it_alone() -> None:
    async with running(max_num_seqs=1, max_num_queued_reqs=1) as (engine, fake):
        fake.executor.row_errors.add("bad")
        with pytest.raises(RequestFailed, match="non-finite"):
            await collect(engine, "bad", params())
        with pytest.raises(InvalidRequest, match="priority") as caught:
            await collect(engine, "a", params(), priority=2)
        assert caught.value.param == "priority"
        with pytest.raises(InvalidRequest, match="at most 5"):
            await collect(engine, "a", params(logprobs=9))
        fake.executor.delay = 0.01
        tasks = [asyncio.create_task(collect(engine, "abc", params(), f"r{i}")) for i in range(4)]
        with pytest.raises(InvalidRequest, match="already in use"):
            await asyncio.sleep(0.02)
            await collect(engine, [1, 2], params(), "r0")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(r, QueueFull) for r in results] == [False, False, True, True]
        assert results[0][-1].finished and results[1][-1].finished
        await idle(engine, fake)


async def test_a_failed_step_ends_its_requests_and_the_engine_goes_on() -> None:
    async with running() as (engine, fake):
        fake.executor.bug = RuntimeError("out of luck")
        with pytest.raises(RequestFailed, match="out of luck"):
            await collect(engine, "a", params())
        assert (await collect(engine, "a", params()))[-1].finished
        await engine.check_health()
        await idle(engine, fake)


async def test_a_dead_loop_ends_every_request_with_engine_dead() -> None:
    async with running(script=lambda prompt, seed: "x" * 190) as (engine, fake):
        fake.executor.delay = 0.002
        tasks = [asyncio.create_task(collect(engine, "a", params(n=2))) for _ in range(3)]
        await asyncio.sleep(0.02)

        def broken() -> bool:
            raise AssertionError("a bug of ours")

        fake.core.has_work = broken  # type: ignore[method-assign]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, EngineDead) for r in results)
        with pytest.raises(EngineDead, match="a bug of ours"):
            await engine.check_health()
        with pytest.raises(EngineDead):
            await collect(engine, "a", params())
        with pytest.raises(EngineDead):
            await engine.stats()


async def test_shutdown_ends_what_runs() -> None:
    async with running(script=lambda prompt, seed: "x" * 190) as (engine, fake):
        fake.executor.delay = 0.005
        task = asyncio.create_task(collect(engine, "a", params()))
        await asyncio.sleep(0.02)
        await engine.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await task
        await engine.shutdown()


async def test_health_notices_a_stall() -> None:
    fake = FakeEngine()
    now = [0.0]
    client = ThreadClient(fake.core, clock=lambda: now[0])
    client.check_health()
    client._is_busy, now[0] = True, 11.0
    with pytest.raises(EngineDead, match="11 s"):
        client.check_health()
    client._is_busy = False
    client.check_health()
    client.close()


async def test_many_streams_with_random_leaving() -> None:
    rng = random.Random(7)
    async with running(max_num_seqs=8) as (engine, fake):

        async def one(i: int) -> str | None:
            leave_after, text = rng.choice([None, None, 1, 3]), ""
            await asyncio.sleep(rng.random() * 0.05)
            async with aclosing(engine.generate(f"prompt {i % 5}", params(n=1 + i % 2, seed=i))) as outputs:
                count = 0
                async for output in outputs:
                    text += "".join(s.text for s in output.outputs if s.index == 0)
                    count += 1
                    if count == leave_after:
                        return None
            return text

        texts = await asyncio.gather(*(one(i) for i in range(100)))
        for i, text in enumerate(texts):
            assert text in (None, f"PROMPT {i % 5} {i}")
        assert sum(text is not None for text in texts) > 30
        await idle(engine, fake)
        assert sum((await engine.stats()).request_success.values()) == 150


async def test_a_request_whose_time_is_over_ends_as_it_is() -> None:
    async with running() as (engine, fake):
        fake.executor.delay = 0.02
        outputs = await collect(engine, "x" * 150, params(timeout=0.3), "slow")
        last = outputs[-1].outputs[0]
        assert (last.finish_reason, last.stop_reason) == ("length", "timeout")
        text = "".join(output.outputs[0].text for output in outputs)
        assert text and ("X" * 150).startswith(text)
        quick = await collect(engine, "ab", params(timeout=30), "quick")
        assert quick[-1].outputs[0].finish_reason == "stop"
        await idle(engine, fake)


async def test_a_request_without_a_token_in_time_fails() -> None:
    async with running() as (engine, fake):
        fake.executor.delay = 0.3
        with pytest.raises(DeadlineExceeded):
            await collect(engine, "ab", params(timeout=0.05), "late")
        fake.executor.delay = 0.0
        await idle(engine, fake)
        assert not engine._readers


async def test_beams_have_a_deadline_too() -> None:
    async with running(max_logprobs=20) as (engine, fake):
        fake.executor.delay = 0.02
        beams = await collect(engine, "x" * 20, params(FINAL, use_beam_search=True, n=2, timeout=0.3, ignore_eos=True, max_tokens=100), "b")
        assert [sample.finish_reason for sample in beams[-1].outputs] == ["length", "length"]
        assert 0 < len(beams[-1].outputs[0].token_ids) < 100
        await idle(engine, fake)


async def test_a_slow_reader_is_given_up_alone() -> None:
    """What waits for it is bounded; who reads, or wants the end only, has the same answer as ever."""
    async with running(max_pending_nbytes=500) as (engine, fake):
        sample, prompt = fake.executor.sample, "x" * 60

        def in_its_time(*args: Any) -> Any:
            time.sleep(0.003)  # as a model takes; at full speed whoever reads would be too slow, too, on a busy machine
            return sample(*args)

        fake.executor.sample = in_its_time  # type: ignore[method-assign]
        async with aclosing(engine.generate(prompt, params(), "slow")) as slow:
            seen = [await anext(slow)]
            others = await asyncio.gather(collect(engine, prompt, params(), "quick"), collect(engine, prompt, params(FINAL), "patient"))
            assert ["".join(output.outputs[0].text for output in outputs) for outputs in others] == ["X" * 60 + " 1"] * 2
            with pytest.raises(RequestFailed, match="too slow"):
                seen += [output async for output in slow]
            assert not seen[-1].finished
        await idle(engine, fake)


async def test_warming_up_needs_nothing_of_a_request() -> None:
    async with running() as (engine, fake):
        await engine.warm_up_grammars()
        await idle(engine, fake)
