"""Answers, events and errors against OpenAI's own specification of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.fakes import MODEL, Rig

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
}  # fmt: skip


class Specification:
    """As much of JSON schema as the responses' part uses. `violations` says where and what; empty is valid."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._schemas = document["components"]["schemas"]

    def violations(self, name: str, value: Any) -> list[str]:
        return self._check(self._schemas[name], value, name)

    def _check(self, schema: dict[str, Any], value: Any, where: str) -> list[str]:
        if "$ref" in schema:
            return self._check(self._schemas[schema["$ref"].rpartition("/")[2]], value, where)
        if schema.get("nullable") and value is None:
            return []
        for kind in ("anyOf", "oneOf"):
            if kind in schema and all(self._check(option, value, where) for option in schema[kind]):
                return [f"{where}: {value!r} fits none of {len(schema[kind])}: {self._check(schema[kind][0], value, where)}"]
        found = [line for part in schema.get("allOf", ()) for line in self._check(part, value, where)]
        types = schema.get("type", [])
        allowed = [kind for name in ([types] if isinstance(types, str) else types) for kind in TYPES[name]]
        if allowed and (not isinstance(value, tuple(allowed)) or (isinstance(value, bool) and bool not in allowed)):
            return [*found, f"{where}: {value!r} is no {types}"]
        if "enum" in schema and value not in schema["enum"]:
            found.append(f"{where}: {value!r} is none of {schema['enum']}")
        if isinstance(value, dict):
            properties = schema.get("properties", {})
            found += [f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value]
            for name, item in value.items():
                more = properties.get(name, schema.get("additionalProperties"))
                found += self._check(more, item, f"{where}.{name}") if isinstance(more, dict) else []
        if isinstance(value, list) and "items" in schema:
            found += [line for i, item in enumerate(value) for line in self._check(schema["items"], item, f"{where}[{i}]")]
        return found


@pytest.fixture(scope="module")
def specification(shared_data: Path) -> Specification:
    return Specification(json.loads(gzip.decompress((shared_data / "openapi" / "openai_openapi.json.gz").read_bytes())))


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


CHATS: list[dict[str, Any]] = [
    {}, {"n": 3}, {"logprobs": True, "top_logprobs": 3}, {"logprobs": True}, {"max_tokens": 1}, {"stop": "o"}, {"tools": TOOLS},
    {"prompt_logprobs": 1}, {"return_token_ids": True}, {"seed": 4, "temperature": 0}, {"response_format": {"type": "json_object"}},
]  # fmt: skip
TEXTS: list[dict[str, Any]] = [
    {}, {"n": 3}, {"logprobs": 0}, {"logprobs": 3}, {"echo": True}, {"prompt": ["a", "b"]}, {"max_tokens": 1}, {"best_of": 3}, {"stop": ["o"]}, {"return_token_ids": True},
]  # fmt: skip


@pytest.mark.parametrize("more", CHATS, ids=[str(sorted(body)) for body in CHATS])
def test_chats(http: httpx.Client, specification: Specification, more: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [USER], "max_tokens": 30, **more}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 200
    assert not specification.violations("CreateChatCompletionResponse", answer.json())
    if "prompt_logprobs" in more:
        return
    for options in (None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        stream = events(http.post(CHAT, json={**body, "stream": True, "stream_options": options}).text)
        assert len(stream) > 1
        for chunk in stream:
            assert not specification.violations("CreateChatCompletionStreamResponse", chunk)


@pytest.mark.parametrize("more", TEXTS, ids=[str(sorted(body)) for body in TEXTS])
def test_completions(http: httpx.Client, specification: Specification, more: dict[str, Any]) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 30, **more}
    assert not specification.violations("CreateCompletionResponse", http.post(TEXT, json=body).json())
    if "best_of" in more:
        return
    for chunk in events(http.post(TEXT, json={**body, "stream": True, "stream_options": {"include_usage": True}}).text):
        for choice in chunk["choices"]:
            if choice["finish_reason"] is None:  # as OpenAI's own streams say, for which the specification has no schema
                choice["finish_reason"] = "stop"
        assert not specification.violations("CreateCompletionResponse", chunk)


def test_models(http: httpx.Client, specification: Specification) -> None:
    assert not specification.violations("ListModelsResponse", http.get("/v1/models").json())
    assert not specification.violations("Model", http.get("/v1/models/alias").json())


def test_errors(http: httpx.Client, specification: Specification) -> None:
    answers = [
        http.post(CHAT, json={"messages": []}), http.post(CHAT, json={"messages": [USER], "temperature": 9}), http.post(CHAT, content=b"{"),
        http.post(CHAT, json={"messages": [USER], "model": "none"}), http.post(TEXT, json={"prompt": "!full"}), http.post(TEXT, json={"prompt": "!bug"}),
        http.post(TEXT, json={"prompt": "!fail"}), http.get("/nowhere"), http.get(CHAT), http.get("/v1/models/none"),
        http.post(TEXT, json={"prompt": "x" * 1000}), http.post("/tokenize", json={}),
    ]  # fmt: skip
    with Rig(api_key=("k",), max_request_body_bytes=10).running() as rig, httpx.Client(base_url=rig.base_url) as strange:
        key = {"Authorization": "Bearer k"}
        answers += [strange.get("/v1/models"), strange.get("/v1/models", headers=key), strange.get("/health")]
        rig.make_ready()
        answers.append(strange.post(TEXT, json={"prompt": "a" * 50}, headers=key))
    assert sorted({answer.status_code for answer in answers}) == [400, 401, 404, 405, 413, 429, 500, 503]
    for answer in answers:
        assert not specification.violations("ErrorResponse", answer.json()), answer.status_code
    for event in events(http.post(CHAT, json={"messages": [{"role": "user", "content": "!fail"}], "stream": True}).text):
        assert not specification.violations("ErrorResponse" if "error" in event else "CreateChatCompletionStreamResponse", event)


def test_the_checker_sees_what_is_wrong(http: httpx.Client, specification: Specification) -> None:
    good = http.post(CHAT, json={"messages": [USER], "logprobs": True, "max_tokens": 2}).json()
    for path, wrong in ((("choices", 0, "finish_reason"), "done"), (("usage", "total_tokens"), "4"), (("created",), True), (("choices", 0, "logprobs", "content", 0, "bytes"), 3)):
        bad = json.loads(json.dumps(good))
        place = bad
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = wrong
        assert specification.violations("CreateChatCompletionResponse", bad), path
    del good["choices"][0]["message"]["refusal"]
    assert specification.violations("CreateChatCompletionResponse", good)
