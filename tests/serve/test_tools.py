"""Tool calls and reasoning over HTTP with the official client: streamed and whole answers say the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from pagoda.base.types import SamplingParams, StructuredOutputsParams
from pagoda.serve.tools import ToolPlan, guided
from pagoda.text.message import output_format
from tests.serve.fakes import MODEL, Rig, byte_tokenizer
from tests.serve.test_openai_specification import Specification, specification
from tests.text.test_messages import CASES
from tests.text.test_messages import TOOLS as TOOLS_OF_CASES

__all__ = ["specification"]  # a fixture

FUNCTION = TOOLS_OF_CASES[0]["function"]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "description": "now", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
REPLY = f"<think>\nI should look.\n</think>\n\nI look.\n{CALL}\n{CALL.replace('get_weather', 'get_time')}"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    made = Rig()
    made.context = dataclasses.replace(made.context, tool_format="hermes", reasoning_format="qwen3")
    with made.make_ready().running() as running:
        yield running


@pytest.fixture
def client(rig: Rig) -> Iterator[openai.OpenAI]:
    rig.engine.reply = REPLY
    with openai.OpenAI(base_url=rig.base_url + "/v1", api_key="none", timeout=10, max_retries=0) as made:
        yield made


def whole(client: openai.OpenAI, **more: Any) -> dict[str, Any]:
    choice = client.chat.completions.create(model=MODEL, messages=MESSAGES, **more).choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    assert all(call.id.startswith("call_") and call.type == "function" for call in choice.message.tool_calls or ())
    return {
        "content": choice.message.content or "",
        "reasoning": getattr(choice.message, "reasoning", None) or "",
        "calls": calls,
        "finish_reason": choice.finish_reason,
    }


def streamed(client: openai.OpenAI, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    calls: list[list[str]] = []
    for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **more):
        choice = chunk.choices[0]
        found["content"] += choice.delta.content or ""
        found["reasoning"] += getattr(choice.delta, "reasoning", None) or ""
        for call in choice.delta.tool_calls or ():
            if call.id:
                assert call.index == len(calls) and call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
        if choice.finish_reason:
            assert found["finish_reason"] is None
            found["finish_reason"] = choice.finish_reason
    return {**found, "calls": [(name, arguments) for name, arguments in calls]}


ARGUMENTS = '{"city": "Zürich"}'
BOTH = [("get_weather", ARGUMENTS), ("get_time", ARGUMENTS)]


@pytest.mark.parametrize(
    ("more", "content", "reasoning", "calls", "reason"),
    [
        ({"tools": TOOLS}, "I look.", "I should look.", BOTH, "tool_calls"),
        ({"tools": TOOLS, "parallel_tool_calls": False}, "I look.", "I should look.", BOTH[:1], "tool_calls"),
        ({"tools": TOOLS, "tool_choice": "none"}, REPLY.partition("</think>\n\n")[2], "I should look.", [], "stop"),
        ({}, REPLY.partition("</think>\n\n")[2], "I should look.", [], "stop"),
        ({"tools": TOOLS, "extra_body": {"include_reasoning": False}}, "I look.", "", BOTH, "tool_calls"),
        ({"tools": TOOLS, "max_tokens": 30}, "", "I should look.\n<", [], "length"),
    ],
)
def test_streaming_equals_whole(
    client: openai.OpenAI, more: dict[str, Any], content: str, reasoning: str, calls: list[Any], reason: str
) -> None:
    expected = {"content": content, "reasoning": reasoning, "calls": calls, "finish_reason": reason}
    if more.get("max_tokens"):
        expected["reasoning"] = REPLY.encode()[:30].decode().removeprefix("<think>\n")
    assert whole(client, **more) == expected
    assert streamed(client, **more) == expected


def last_params(rig: Rig) -> SamplingParams:
    return list(rig.engine.params.values())[-1]


def test_a_named_function_is_held_by_a_grammar(rig: Rig, client: openai.OpenAI) -> None:
    rig.engine.reply = ARGUMENTS
    more = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    expected = {"content": "", "reasoning": "", "calls": [("get_weather", ARGUMENTS)], "finish_reason": "tool_calls"}
    assert whole(client, **more) == expected == streamed(client, **more)
    wanted = last_params(rig).structured_outputs
    assert wanted is not None and wanted.json == {**SCHEMA, "additionalProperties": False}


@pytest.mark.parametrize(
    "choice", ["required", {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOLS[0], TOOLS[1]]}}]
)
def test_required_calls_are_held_by_a_grammar(rig: Rig, client: openai.OpenAI, choice: Any) -> None:
    rig.engine.reply = f'[{{"name": "get_weather", "parameters": {ARGUMENTS}}}, {{"name": "get_time", "parameters": {{}}}}]'
    more = {"tools": TOOLS, "tool_choice": choice}
    calls = [("get_weather", ARGUMENTS), ("get_time", "{}")]
    assert whole(client, **more) == {"content": "", "reasoning": "", "calls": calls, "finish_reason": "tool_calls"} == streamed(client, **more)
    wanted = last_params(rig).structured_outputs
    assert wanted is not None and isinstance(wanted.json, dict) and wanted.json["type"] == "array" and wanted.json["minItems"] == 1


def test_samples_do_not_mix(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=2, temperature=1, tools=TOOLS)
    first, second = sorted(answer.choices, key=lambda choice: choice.index)
    assert first.finish_reason == "tool_calls" and second.finish_reason == "stop"
    assert not second.message.tool_calls


def test_a_template_without_calls(rig: Rig, client: openai.OpenAI) -> None:
    """The fixture's template tells nothing; a grammar with reasoning needs tokens of its own for the markers, which bytes have not."""
    rig.engine.reply = json.dumps({"city": "Bern"})
    more = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
    assert json.loads(whole(client, **more)["content"]) == {"city": "Bern"}
    wanted = last_params(rig).structured_outputs
    assert wanted is not None and wanted.starts_after == []


def raw(rig: Rig, body: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the events of the streamed one."""
    with httpx.Client(base_url=rig.base_url, timeout=10) as http:
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        text = http.post("/v1/chat/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    assert text.endswith("data: [DONE]\n\n")
    return answer.json(), [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_format_over_http(rig: Rig, specification: Specification, name: str) -> None:
    """Text, calls, logprobs, usage and reason: the events join to the whole answer, and both are as OpenAI specifies."""
    rig.state.ready(dataclasses.replace(rig.context, tool_format=name, reasoning_format="qwen3"), rig.engine)
    rig.engine.reply = "<think>hm</think>" + CASES[name][0]
    tools = [{"type": "function", "function": {"name": "f", "parameters": FUNCTION["parameters"]}}]
    body = {"model": MODEL, "messages": MESSAGES, "tools": tools, "logprobs": True, "top_logprobs": 1, "max_tokens": 480}
    try:
        whole, events = raw(rig, body)
    finally:
        rig.state.ready(rig.context, rig.engine)
    assert specification.violations("CreateChatCompletionResponse", whole) == []
    for event in events:
        assert specification.violations("CreateChatCompletionStreamResponse", event) == []
    choice, message = whole["choices"][0], whole["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f"] * len(CASES[name][1])
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == CASES[name][1]
    parts = [event["choices"][0] for event in events if event["choices"]]
    said = {key: "".join(part["delta"].get(key) or "" for part in parts) for key in ("content", "reasoning")}
    assert said == {"content": message["content"] or "", "reasoning": message["reasoning"]} and said["reasoning"] == "hm"
    arguments = [""] * len(message["tool_calls"])
    for part in parts:
        for call in part["delta"].get("tool_calls") or ():
            arguments[call["index"]] += call["function"].get("arguments") or ""
    assert arguments == CASES[name][1]
    assert [token for part in parts for token in (part["logprobs"] or {}).get("content") or ()] == choice["logprobs"]["content"]
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]] == ["tool_calls"]
    assert events[-1]["usage"] == whole["usage"]


def test_structure_begins_behind_reasoning() -> None:
    """Where the markers are tokens of their own: at once, behind the end, or behind the end if the model chooses to think."""
    tokenizer = byte_tokenizer()
    tokenizer.backend.add_special_tokens(["<think>", "</think>"])
    start, end = (tokenizer.token_to_id(marker) for marker in ("<think>", "</think>"))
    context = dataclasses.replace(Rig().context, tokenizer=tokenizer, reasoning_format="qwen3")
    wanted = StructuredOutputsParams(json_object=True)
    for prompt, starts_after, opens_with in [
        ("user: Hi\nassistant: ", [end], start),
        ("assistant: <think>\n", [end], None),
        ("assistant: <think>\n\n</think>\n\n", [], None),
    ]:
        found = guided(wanted, ToolPlan(output_format(None, "qwen3")), prompt, context)
        assert (found.starts_after, found.opens_with) == (starts_after, opens_with), prompt
    assert guided(wanted, ToolPlan(output_format(None, None)), "<think>", context) == wanted
