"""The whole program: `pagoda serve` as a process, the default model, the official client. torch cannot be imported."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

openai = pytest.importorskip("openai", reason="the official client; `make setup` installs it")

ROOT = Path(__file__).resolve().parents[2]
NUM_STREAMS = 200
MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def server(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server in whose processes `import torch` fails."""
    blocked = tmp_path_factory.mktemp("blocked")
    for name in ("torch", "transformers"):
        (blocked / f"{name}.py").write_text("raise ImportError('serving must not need this')")
    command = [sys.executable, "-m", "pagoda.cli", "serve", "--port", "0", "--kv-cache-memory-bytes", "256M"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blocked), str(ROOT)])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        yield wait_for_url(process, lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "".join(lines)
    finally:
        process.kill()
        process.wait()


def wait_for_url(process: subprocess.Popen[str], lines: list[str]) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"Serving \S+ on (http://\S+)", "".join(lines)):
            return found.group(1)
        time.sleep(0.02)
    raise AssertionError("the server did not start:\n" + "".join(lines))


def figures(server: str) -> dict[str, float]:
    """name (with labels) -> value of /metrics."""
    text = httpx.get(f"{server}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.M)}


def total(found: dict[str, float], name: str) -> float:
    return sum(value for key, value in found.items() if key.partition("{")[0] == name)


def test_structured_output_over_http(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}},
    )
    assert json.loads(answer.choices[0].message.content) in ({"city": "Paris"}, {"city": "Rome"})
    stream = client.completions.create(model=MODEL, prompt="Now: ", stream=True, extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    assert re.fullmatch("[0-9]{4}", "".join(chunk.choices[0].text for chunk in stream))
    loose = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 2}
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], extra_body={"structured_outputs": {"json": loose}}
    )
    assert "uniqueItems" in raw.headers["x-pagoda-warning"]
    with pytest.raises(openai.BadRequestError, match="cannot be enforced"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"structured_outputs": {"regex": "(a"}})


def test_structured_streams_with_random_aborts(server: str) -> None:
    """Schemas, expressions, forced calls and bad grammars together, a third of them left early: each fits, and nothing is left behind."""
    draw = random.Random(3)
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "integer", "maximum": 99}},
              "required": ["name", "n"], "additionalProperties": False}  # fmt: skip
    kinds: list[dict[str, object]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"extra_body": {"structured_outputs": {"regex": "[a-z]{5,9} [0-9]{2}"}}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}], "tool_choice": "required", "parallel_tool_calls": False},
        {"extra_body": {"structured_outputs": {"regex": "(a"}}},
    ]
    ends: Counter[str] = Counter()

    async def one(client: openai.AsyncOpenAI, i: int) -> None:
        leave_after = draw.choice([None, None, draw.randint(1, 8)])
        asked = {"model": MODEL, "messages": [{"role": "user", "content": f"Person {i}"}], "max_tokens": 120, "seed": i, "stream": True}
        try:
            stream = await client.chat.completions.create(**asked, **kinds[i % 4])
        except openai.BadRequestError:
            ends[f"refused {i % 4}"] += 1
            return
        text, reason, num = "", None, 0
        async for chunk in stream:
            num += 1
            if leave_after is not None and num > leave_after:
                await stream.close()
                ends["left"] += 1
                return
            delta = chunk.choices[0].delta
            text += (delta.content or "") + "".join(call.function.arguments or "" for call in delta.tool_calls or ())
            reason = chunk.choices[0].finish_reason or reason
        if reason == "length":
            ends["length"] += 1
            return
        assert re.fullmatch("[a-z]{5,9} [0-9]{2}", text) if i % 4 == 1 else json.loads(text)["n"] <= 99
        ends["fits"] += 1

    async def all_of_them() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as client:
            await asyncio.gather(*(one(client, i) for i in range(80)))

    asyncio.run(all_of_them())
    assert ends["refused 3"] == 20 and sum(ends.values()) == 80 and ends["fits"] > 10, ends
    end = time.monotonic() + 10
    while (found := figures(server)) and total(found, "vllm:num_requests_running") + total(found, "vllm:num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert total(figures(server), "vllm:kv_cache_usage_perc") == 0.0


def test_forced_tool_calls(server: str) -> None:
    """Held by a grammar, so any model can make them; streamed and whole answers are the same."""
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
              "required": ["city", "days"], "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}}}  # fmt: skip
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("weather", "hotels")]
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Weather in Paris, 3 days?"}], "tools": tools, "temperature": 0}
    for choice in ("required", {"type": "function", "function": {"name": "hotels"}}):
        message = client.chat.completions.create(**asked, tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert message.finish_reason == "tool_calls" and len(message.message.tool_calls) == 1
        call = message.message.tool_calls[0].function
        arguments = json.loads(call.arguments)
        assert arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9
        assert call.name in (("weather", "hotels") if choice == "required" else ("hotels",))
        said = ["", ""]
        for chunk in client.chat.completions.create(**asked, tool_choice=choice, parallel_tool_calls=False, stream=True):
            for part in chunk.choices[0].delta.tool_calls or ():
                said = [said[0] + (part.function.name or ""), said[1] + (part.function.arguments or "")]
        assert said == [call.name, call.arguments]


def test_the_capital_of_france(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_streaming_equals_not_streaming(server: str) -> None:
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    ask = dict(model=MODEL, prompt="Once upon a time", max_tokens=40, temperature=0.9, seed=3)
    whole = client.completions.create(**ask)
    parts = list(client.completions.create(**ask, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == [whole.choices[0].finish_reason]


async def one_stream(client: openai.AsyncOpenAI, i: int, rng: random.Random) -> str:
    """Reads a stream to its end, or leaves it after a few events."""
    leaves_after = rng.randint(0, 10) if rng.random() < 0.4 else None
    stream = await client.completions.create(
        model=MODEL,
        prompt=f"Story number {i % 17}: " + "the cat and the dog " * rng.randint(1, 12),
        max_tokens=rng.randint(1, 24),
        temperature=1.0,
        stream=True,
        n=2 if i % 13 == 0 else 1,
        extra_body={"ignore_eos": True},
    )
    reasons, events = [], 0
    async for part in stream:
        events += 1
        reasons += [choice.finish_reason for choice in part.choices if choice.finish_reason]
        if leaves_after is not None and events > leaves_after:
            await stream.close()
            return "left"
    assert reasons == ["length"] * (2 if i % 13 == 0 else 1), reasons
    return "finished"


async def test_200_streams_with_random_aborts(server: str) -> None:
    before = figures(server)
    rng = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    async with openai.AsyncOpenAI(
        base_url=f"{server}/v1", api_key="none", max_retries=0, http_client=httpx.AsyncClient(limits=limits, timeout=240)
    ) as client:
        ends = Counter(await asyncio.gather(*[one_stream(client, i, random.Random(rng.random())) for i in range(NUM_STREAMS)]))
    assert ends["finished"] + ends["left"] == NUM_STREAMS and ends["left"] > 30
    after = figures(server)
    end = time.monotonic() + 20
    while total(after, "vllm:num_requests_running") + total(after, "vllm:num_requests_waiting") and time.monotonic() < end:
        await asyncio.sleep(0.1)
        after = figures(server)
    assert total(after, "vllm:num_requests_running") == total(after, "vllm:num_requests_waiting") == 0
    assert total(after, "vllm:kv_cache_usage_perc") == 0, "blocks are still owned"
    ended = total(after, "vllm:request_success_total") - total(before, "vllm:request_success_total")
    num_samples = NUM_STREAMS + len(range(0, NUM_STREAMS, 13))  # every 13th asks for two
    assert ended == num_samples, "every sample ends exactly once"
    await asyncio.sleep(2.5)  # an idle engine checks its books once, and dies if they are wrong
    assert httpx.get(f"{server}/health").status_code == 200
