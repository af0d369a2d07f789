"""Fields that only some servers allow or some models can serve, and what an answer may tell beside its text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from pagoda.base.config import ServerConfig
from pagoda.base.errors import ConfigError
from pagoda.base.types import RequestMetrics
from pagoda.serve.checks import template_kwargs
from pagoda.serve.server import _template_maker
from pagoda.serve.wire import timings
from tests.serve.fakes import Rig, infill_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def post(rig: Rig, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(rig.base_url + path, json=body, timeout=10)


# ---- unknown fields


def test_unknown_fields_are_named_in_a_header(http: httpx.Client) -> None:
    for path, body in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "a"}), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        answer = http.post(path, json={**body, "temprature": 1, "colour": "red"})
        assert answer.status_code == 200
        assert answer.headers["x-pagoda-warning"] == "unknown field temprature ignored; unknown field colour ignored"
        assert "x-pagoda-warning" not in http.post(path, json=body).headers


def test_unknown_fields_of_inner_objects_are_named_too(http: httpx.Client) -> None:
    body = {
        "messages": [USER], "stream": True, "stream_options": {"include_usage": True, "colour": 1},
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "x-mine": 1}, "strickt": True}},
    }  # fmt: skip
    found = http.post(CHAT, json=body).headers["x-pagoda-warning"]
    assert found == "unknown field stream_options.colour ignored; unknown field response_format.json_schema.strickt ignored"


def test_strict_fields() -> None:
    with Rig(strict_fields=True).make_ready().running() as rig:
        for path, body in ((CHAT, {"messages": [USER]}), (TEXT, {"prompt": "a"}), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            answer = post(rig, path, {**body, "temprature": 1})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "temprature"
            assert answer.json()["error"]["code"] == "unknown_field"
            assert post(rig, path, body).status_code == 200
        assert post(rig, CHAT, {"messages": [USER], "metadata": {"a": "b"}, "store": False}).status_code == 200, "OpenAI's own"


# ---- /invocations


def test_invocations_go_by_their_body(http: httpx.Client) -> None:
    assert http.post("/invocations", json={"messages": [USER]}).json()["object"] == "chat.completion"
    assert http.post("/invocations", json={"prompt": "a"}).json()["object"] == "text_completion"
    assert http.post("/invocations", json={"messages": [USER], "stream": True}).text.endswith("data: [DONE]\n\n")
    for bad in ({}, {"input": "a"}, {"messages": []}):
        error = http.post("/invocations", json=bad)
        assert error.status_code == 400 and error.json()["error"]["param"] == "messages"
    assert http.post("/invocations", content=b"{", headers={"Content-Type": "application/json"}).status_code == 400


# ---- timings


def test_timings_add_up() -> None:
    one = RequestMetrics(arrival_time=1.0, queued_time=1.0, scheduled_time=1.25, first_token_time=1.5, last_token_time=3.5)
    found = timings([one], 5, 1)
    assert (found.time_to_first_token_ms, found.generation_time_ms, found.queue_time_ms) == (500.0, 2000.0, 250.0)
    assert (found.mean_itl_ms, found.tokens_per_second) == (500.0, 2.0)
    assert timings([one], 1, 1).mean_itl_ms is None
    assert timings([RequestMetrics(arrival_time=1.0)], 0, 1) == timings([], 0, 1)
    later = RequestMetrics(arrival_time=1.0, queued_time=1.0, scheduled_time=2.0, first_token_time=2.5, last_token_time=5.0)
    both = timings([one, later], 10, 2)
    assert (both.time_to_first_token_ms, both.generation_time_ms, both.queue_time_ms, both.tokens_per_second) == (500.0, 3500.0, 1000.0, 2.5)


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": [USER]}), (TEXT, {"prompt": "a"})])
def test_timings_are_told_where_the_server_allows_it(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    assert "metrics" not in http.post(path, json=body).json()
    rig = Rig()
    rig.context = replace(rig.context, tells_timings=True)
    with rig.make_ready().running():
        found = post(rig, path, body).json()["metrics"]
        assert found["time_to_first_token_ms"] == pytest.approx(200) and found["generation_time_ms"] == pytest.approx(300)
        text = post(rig, path, {**body, "stream": True, "stream_options": {"include_usage": True}}).text
        chunks = [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]
        assert [chunk["metrics"] for chunk in chunks if "metrics" in chunk] == [found], "beside the usage"
        assert chunks[-1]["usage"] and "metrics" in chunks[-1]


# ---- templates of requests


def test_a_template_in_the_request_needs_trust(http: httpx.Client) -> None:
    body = {"messages": [USER], "chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}"}
    for path in (CHAT, "/tokenize"):
        error = http.post(path, json=body).json()["error"]
        assert error["param"] == "chat_template" and "--trust-request-chat-template" in error["message"]
    rig = Rig()
    rig.context = replace(rig.context, make_template=_template_maker({}))
    with rig.make_ready().running():
        assert post(rig, CHAT, body).status_code == 200
        assert [prompt["prompt"] for prompt in rig.engine.prompts.values()] == ["[hi]"]
        assert post(rig, "/tokenize", body).json()["count"] == 4
        for bad in ("{% for %}", "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}"):
            error = post(rig, CHAT, {**body, "chat_template": bad})
            assert error.status_code == 400, bad


# ---- suffix


def test_suffix_fills_a_gap(http: httpx.Client) -> None:
    error = http.post(TEXT, json={"prompt": "a", "suffix": "end"}).json()["error"]
    assert error["param"] == "suffix" and error["code"] == "unsupported"
    assert http.post(TEXT, json={"prompt": "a", "suffix": ""}).status_code == 200
    rig = Rig()
    rig.context = replace(rig.context, tokenizer=infill_tokenizer())
    with rig.make_ready().running():
        assert post(rig, TEXT, {"prompt": "ab", "suffix": "yz"}).status_code == 200
        encode = rig.context.tokenizer.encode
        expected = [258, *encode("ab", add_special_tokens=False), 259, *encode("yz", add_special_tokens=False), 260]
        assert [prompt["prompt_token_ids"] for prompt in rig.engine.prompts.values()] == [expected]
        assert post(rig, TEXT, {"prompt": [1, 2], "suffix": "yz"}).json()["error"]["param"] == "suffix"


# ---- what a server does where a request does not say


def test_server_wide_choices() -> None:
    rig = Rig()
    rig.context = replace(rig.context, forces_usage=True, names_tokens_by_id=True, default_template_kwargs={"mood": "calm", "pace": 1})
    with rig.make_ready().running():
        body = {"messages": [USER], "max_tokens": 2, "logprobs": True}
        text = post(rig, CHAT, {**body, "stream": True}).text
        assert json.loads(text.split("\n\n")[-3][6:])["usage"]["completion_tokens"] == 2
        assert rig.template.last["mood"] == "calm"
        answer = post(rig, CHAT, {**body, "chat_template_kwargs": {"mood": "wild"}}).json()
        assert (rig.template.last["mood"], rig.template.last["pace"]) == ("wild", 1)
        assert answer["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")
        plain = post(rig, CHAT, {**body, "return_tokens_as_token_ids": False}).json()
        assert plain["choices"][0]["logprobs"]["content"][0]["token"] == "H"


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_template_kwargs_that_are_no_object_are_refused_at_start(text: str) -> None:
    with pytest.raises(ConfigError, match="default-chat-template-kwargs"):
        template_kwargs(ServerConfig(default_chat_template_kwargs=text))
    assert template_kwargs(ServerConfig(default_chat_template_kwargs='{"a": 1}')) == {"a": 1}
