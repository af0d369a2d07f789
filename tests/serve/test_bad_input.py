"""Bad input is answered with OpenAI's error body and the right status; never 422, never 500, never silence."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import httpx
import msgspec
import pytest

from pagoda.serve.openai_chat import ChatCompletionRequest
from pagoda.serve.openai_completions import CompletionRequest
from pagoda.serve.tokenize import DetokenizeRequest, TokenizeRequest
from tests.serve.fakes import MAX_MODEL_LEN, MODEL, Rig

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and isinstance(body["error"]["type"], str)
    return body["error"]


BAD_CHATS = {
    "messages": [
        {"messages": []}, {"messages": None}, {"messages": "hi"}, {}, {"messages": [3]},
        {"messages": [{"role": "explode", "content": ""}]},
    ],
    "messages[0].role": [{"messages": [{"role": 5, "content": "x"}]}, {"messages": [{"content": "x"}]}],
    "messages[0].content": [{"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 7}]}],
    "messages[1].content[0]": [
        {"messages": [USER, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        {"messages": [USER, {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    ],
    "messages[0].content[0].text": [{"messages": [{"role": "user", "content": [{"type": "text"}]}]}],
    "temperature": [{"temperature": "hot"}, {"temperature": -1}, {"temperature": 2.5}, {"temperature": [1]}],
    "top_p": [{"top_p": 0}, {"top_p": 1.5}],
    "max_tokens": [{"max_tokens": -1}, {"max_tokens": 0}, {"max_tokens": 1.5}, {"max_tokens": "5"}, {"max_tokens": 10**30}],
    "n": [{"n": 0}, {"n": -3}, {"n": 10**9}, {"n": 2, "temperature": 0}, {"n": True}],
    "seed": [{"seed": 2**70}, {"seed": 1.5}],
    "stop": [{"stop": [""]}, {"stop": 5}, {"stop": [5]}],
    "stop_token_ids[0]": [{"stop_token_ids": ["a"]}],
    "logit_bias": [{"logit_bias": {"x": 1}}, {"logit_bias": [1]}, {"logit_bias": {"-1": 1}}],
    "logit_bias[...]": [{"logit_bias": {"1": "x"}}],
    "top_logprobs": [{"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 21}, {"logprobs": True, "top_logprobs": -2}],
    "logprobs": [{"logprobs": 3}],
    "frequency_penalty": [{"frequency_penalty": 3}],
    "repetition_penalty": [{"repetition_penalty": 0}, {"repetition_penalty": 1e-300}],
    "min_p": [{"min_p": -0.1}],
    "top_k": [{"top_k": -2}],
    "min_tokens": [{"min_tokens": 9, "max_tokens": 3}],
    "stream_options": [{"stream_options": {"include_usage": True}}],
    "prompt_logprobs": [{"prompt_logprobs": 1, "stream": True}],
    "stream": [{"stream": "yes"}],
    "tools": [{"tools": []}],
    "tools[0].function": [{"tools": [{}]}],
    "tools[0].type": [{"tools": [{"type": "custom", "custom": {}}]}],
    "tools[0].function.name": [{"tools": [{"type": "function", "function": {"name": "a b"}}]}],
    "tools[0].function.parameters": [{"tools": [{"type": "function", "function": {"name": "a", "parameters": [1]}}]}],
    "tools[1].function.name": [{"tools": [{"type": "function", "function": {"name": "a"}}] * 2}],
    "tool_choice": [
        {"tool_choice": "required"},
        {"tool_choice": "auto"},
        {"tool_choice": "some"},
        {"tool_choice": {"type": "function"}},
        {"tool_choice": {"type": "function", "function": {"name": "b"}}, "tools": [{"type": "function", "function": {"name": "a"}}]},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
    ],
    "response_format.type": [{"response_format": {"type": "xml"}}],
    "response_format.json_schema": [{"response_format": {"type": "json_schema"}}, {"response_format": {"type": "json_schema", "json_schema": {}}}],
    "modalities": [{"modalities": ["text", "audio"]}],
    "audio": [{"audio": {"voice": "a"}}],
    "guided_json": [{"guided_json": {}}],
    "structured_outputs": [
        {"structured_outputs": {}},
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        {"structured_outputs": {"regex": "(a"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"grammar": "start: nothing"}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"json": {"type": "strin"}}},
        {"structured_outputs": {"structural_tag": {"structures": [], "triggers": []}}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
    ],
    "chat_template": [{"chat_template": "{{ 1 }}"}, {"chat_template": ""}],
    "chat_template_kwargs": [{"chat_template_kwargs": {"tools": 1}}],
    "continue_final_message": [{"continue_final_message": True, "add_generation_prompt": True}],
    "cache_salt": [{"cache_salt": ""}, {"cache_salt": "x" * 1025}],
    "priority": [{"priority": 3}],
    "prompt": [{"messages": [{"role": "user", "content": "x" * 600}]}],
}  # fmt: skip

BAD_COMPLETIONS = {
    "prompt": [
        {"prompt": None}, {}, {"prompt": []}, {"prompt": [[]]}, {"prompt": ["a", 1]}, {"prompt": [1, [2]]}, {"prompt": ""},
        {"prompt": [999999]}, {"prompt": [-1]}, {"prompt": {"text": "a"}}, {"prompt": ["a"] * 1025}, {"prompt": "x" * 600},
    ],
    "prompt[0]": [{"prompt": [1.5]}],
    "max_tokens": [{"prompt": "a", "max_tokens": 0}, {"prompt": "a", "max_tokens": -5}],
    "logprobs": [{"prompt": "a", "logprobs": 21}, {"prompt": "a", "logprobs": True}, {"prompt": "a", "logprobs": -2}],
    "best_of": [{"prompt": "a", "best_of": 1, "n": 2}, {"prompt": "a", "best_of": 3, "stream": True}],
    "suffix": [{"prompt": "a", "suffix": "end"}],
    "stream": [{"prompt": "a", "use_beam_search": True, "stream": True}],
    "typical_p": [{"prompt": "a", "typical_p": 0}],
    "mirostat_mode": [{"prompt": "a", "mirostat_mode": 1}],
    "vllm_xargs": [{"prompt": "a", "vllm_xargs": [1]}],
}  # fmt: skip


@pytest.mark.parametrize(("param", "bodies"), BAD_CHATS.items(), ids=BAD_CHATS.keys())
def test_bad_chat(http: httpx.Client, param: str, bodies: list[dict[str, Any]]) -> None:
    for body in bodies:
        given = body if param == "messages" else {"messages": [USER], **body}
        for stream in ({}, {"stream": True}) if "stream" not in body and "stream_options" not in body else ({},):
            error = error_of(http.post(CHAT, json={"model": MODEL, **given, **stream}), 400)
            if param not in ("messages", "stop_token_ids[0]", "stop"):
                assert error["param"] == param, (body, error)


@pytest.mark.parametrize(("param", "bodies"), BAD_COMPLETIONS.items(), ids=BAD_COMPLETIONS.keys())
def test_bad_completion(http: httpx.Client, param: str, bodies: list[dict[str, Any]]) -> None:
    for body in bodies:
        error = error_of(http.post(TEXT, json={"model": MODEL, **body}), 400)
        assert (error["param"] or "prompt").startswith(param[:6]), (body, error)


def test_what_is_missing_is_named(http: httpx.Client) -> None:
    for path, body, name in ((CHAT, {}, "messages"), (CHAT, {"messages": [USER, {"content": "a"}]}, "messages[1].role"), (TEXT, {}, "prompt"), ("/detokenize", {}, "tokens")):
        error = error_of(http.post(path, json=body), 400)
        assert (error["param"], error["message"]) == (name, f"`{name}` is missing")


def test_every_wrong_type_of_every_field(http: httpx.Client) -> None:
    """No field of the request structs turns a wrong type into anything but a 400 (or is happy with it)."""
    bodies: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
        CHAT: (ChatCompletionRequest, {"messages": [USER], "max_tokens": 1}),
        TEXT: (CompletionRequest, {"prompt": "a", "max_tokens": 1}),
        "/tokenize": (TokenizeRequest, {"prompt": "a"}),
        "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
    }
    for path, (kind, valid) in bodies.items():
        assert http.post(path, json=valid).status_code == 200
        for name in kind.__struct_fields__:
            for value in (-1, 3, 1.5, "x", True, [], ["x"], {}, {"x": 1}, [[{}]], 2**60):
                response = http.post(path, json=valid | {name: value})
                assert response.status_code in (200, 400, 404), (path, name, value, response.text)


NOT_JSON = [b"", b"{", b"[]", b"null", b"3", b'{"messages": [}', b"\xff\xfe", b'{"model": "\xff"}', b'{"temperature": NaN}',
            b'{"messages":' + b"[" * 100_000, b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"temperature": 1e999}', b'{"prompt": "\\ud800"}']  # fmt: skip


@pytest.mark.parametrize("raw", NOT_JSON, ids=range(len(NOT_JSON)))
def test_not_json(http: httpx.Client, raw: bytes) -> None:
    for path in (CHAT, TEXT, "/tokenize", "/detokenize"):
        error_of(http.post(path, content=raw, headers={"content-type": "application/json"}), 400)


def test_content_type(http: httpx.Client) -> None:
    body = json.dumps({"messages": [USER]}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; boundary=x"):
        error_of(http.post(CHAT, content=body, headers={"content-type": kind}), 400)
    assert http.post(CHAT, content=body, headers={"content-type": "application/json; charset=utf-8"}).status_code == 200


def test_routes_and_methods(http: httpx.Client) -> None:
    assert error_of(http.get("/nope"), 404)["code"] == "route_not_found"
    assert error_of(http.post("/v1/chat/completions/"), 404)
    assert "POST" in http.get(CHAT).headers["allow"]
    error_of(http.get(CHAT), 405)
    error_of(http.post("/v1/models"), 405)
    assert error_of(http.post(CHAT, json={"model": "gpt-4", "messages": [USER]}), 404)["code"] == "model_not_found"
    assert http.post(CHAT, json={"model": "alias", "messages": [USER]}).json()["model"] == MODEL


def test_unknown_fields_are_told(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"messages": [USER], "tempreature": 1, "user": "u", "metadata": {"a": "b"}, "store": False, "n": None})
    assert answer.headers["x-pagoda-warning"] == "unknown field tempreature ignored"
    nasty = http.post(CHAT, json={"messages": [USER], "a\r\nSet-Cookie: b": 1, "ü": 2})
    assert nasty.status_code == 200 and "set-cookie" not in nasty.headers
    assert "x-pagoda-warning" not in http.post(CHAT, json={"messages": [USER]}).headers


def test_extreme_values_fit_the_worker(rig: Rig, http: httpx.Client) -> None:
    body = {"prompt": "a", "top_k": 2**53, "min_tokens": 0, "seed": -(2**63), "logit_bias": {"5": 1e308}, "temperature": 1e-300}
    assert http.post(TEXT, json=body | {"request_id": "extreme"}).status_code == 200
    params = next(params for name, params in rig.engine.params.items() if name.startswith("cmpl-extreme"))
    assert (params.top_k, params.logit_bias, params.temperature) == (2**31 - 1, {5: 100.0}, 0.01)


def test_more_tokens_than_the_context_has(http: httpx.Client) -> None:
    """As vLLM: too many by themselves are refused by the field's name; what only the prompt leaves no room for is cut."""
    chat, many = {"messages": [USER]}, MAX_MODEL_LEN + 1
    for path, body, name in (
        (CHAT, {**chat, "max_tokens": many}, "max_tokens"), (CHAT, {**chat, "max_completion_tokens": many, "max_tokens": 1}, "max_completion_tokens"),
        (TEXT, {"prompt": "a", "max_tokens": many}, "max_tokens"), (TEXT, {"prompt": "a", "max_tokens": 2**53, "stream": True}, "max_tokens"),
    ):  # fmt: skip
        answer = http.post(path, json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == name and error["code"] == "context_length_exceeded" and str(MAX_MODEL_LEN) in error["message"]
    for path, body in ((CHAT, {**chat, "max_tokens": MAX_MODEL_LEN}), (CHAT, {**chat, "max_tokens": many, "max_completion_tokens": 1}), (TEXT, {"prompt": "a", "max_tokens": MAX_MODEL_LEN})):
        assert http.post(path, json=body).status_code == 200


def test_request_id(http: httpx.Client) -> None:
    answer = http.post(CHAT, json={"messages": [USER]}, headers={"X-Request-Id": "abc"})
    assert answer.json()["id"] == "chatcmpl-abc" and answer.headers["x-request-id"] == "abc"
    error_of(http.post(CHAT, json={"messages": [USER]}, headers={"X-Request-Id": "x" * 300}), 400)


def test_our_bug_keeps_its_secret(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "pagoda.serve"):
        for stream in (False, True):
            error = error_of(http.post(TEXT, json={"prompt": "!bug", "stream": stream}), 500)
            assert "secret" not in error["message"]
    assert "a secret of ours" in caplog.text and http.get("/health").status_code == 200


@pytest.mark.parametrize("word", ["!fail", "!nan"])
def test_failed_request(http: httpx.Client, word: str) -> None:
    """Before the headers it is a 500; behind them it is an error event, then [DONE]."""
    error_of(http.post(TEXT, json={"prompt": word}), 500)
    lines = [line for line in http.post(TEXT, json={"prompt": word, "stream": True}).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["error"]["type"] == "InternalServerError"
    assert [("error" in line) for line in lines[:-2]].count(True) == 0


def test_huge_body() -> None:
    with Rig(max_request_body_bytes=10_000).make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        assert http.post(TEXT, json={"prompt": "x" * 400, "max_tokens": 1}).status_code == 200
        assert error_of(http.post(TEXT, json={"prompt": "x" * 20_000}), 413)["code"] == "payload_too_large"
        parts = (b"x" * 1000 for _ in range(30))
        error_of(http.post(TEXT, content=parts, headers={"content-type": "application/json"}), 413)
        assert http.post(TEXT, json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_keys() -> None:
    with Rig(api_key=("sesame", "two")).make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}, {"Authorization": "Bearer"}):
            answer = http.get("/v1/models", headers=header)
            assert error_of(answer, 401)["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
            error_of(http.post("/tokenize", json={"prompt": "a"}, headers=header), 401)
        for key in ("sesame", "two"):
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        for path in ("/health", "/ready", "/ping", "/version", "/load", "/metrics"):
            assert http.get(path).status_code == 200


def test_broken_http_disturbs_nobody(rig: Rig, http: httpx.Client) -> None:
    host, port = rig.base_url.removeprefix("http://").split(":")
    for raw in (b"\x00\x01\x02", b"GET / HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 50\r\n\r\n{"):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(raw)
    assert http.get("/health").status_code == 200
