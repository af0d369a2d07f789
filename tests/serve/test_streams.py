"""Golden transcripts of event streams, byte for byte but for times and random ids; disconnects; slow clients."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import httpx
import pytest

from tests.serve.fakes import MODEL, Rig

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def transcript(http: httpx.Client, path: str, body: dict[str, object]) -> str:
    answer = http.post(path, json=body | {"stream": True}, headers={"X-Request-Id": "golden"})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    text = re.sub(r'"created":\d+', '"created":0', answer.text)
    return re.sub(r'"system_fingerprint":"[^"]+"', '"system_fingerprint":"f"', text)


def chat_event(rest: str) -> str:
    head = '{"id":"chatcmpl-golden","object":"chat.completion.chunk","created":0,"model":"fake/bytes",'
    return f'data: {head}"choices":[{rest}],"system_fingerprint":"f"'


def test_golden_chat(http: httpx.Client) -> None:
    body = {"messages": [USER], "max_tokens": 8, "stream_options": {"include_usage": True}}
    pieces = ["H", "e", "l", "l", "o", " ", "w"]
    expected = [chat_event('{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}') + "}"]
    expected += [chat_event(f'{{"index":0,"delta":{{"content":"{p}"}},"logprobs":null,"finish_reason":null}}') + "}" for p in pieces]
    expected += [chat_event('{"index":0,"delta":{"content":"\ufffd"},"logprobs":null,"finish_reason":"length","stop_reason":null}') + "}"]
    usage = '{"prompt_tokens":20,"completion_tokens":8,"total_tokens":28,"prompt_tokens_details":{"cached_tokens":4}}'
    expected += [chat_event("") + f',"usage":{usage}}}', "data: [DONE]", ""]
    assert transcript(http, CHAT, body) == "\n\n".join(expected)


def test_golden_completion(http: httpx.Client) -> None:
    head = '{"id":"cmpl-golden","object":"text_completion","created":0,"model":"fake/bytes","choices":[{'
    choice = '"index":0,"text":"%s","logprobs":%s,"finish_reason":%s,"stop_reason":%s'
    logprobs = '{"text_offset":[%d],"token_logprobs":[-0.25],"tokens":["%s"],"top_logprobs":[{"%s":-0.25}]}'
    rows = [("H", logprobs % (0, "H", "H"), "null", "null"), ("e", logprobs % (1, "e", "e"), '"length"', "null")]
    expected = [f"data: {head}{choice % row}}}],\"system_fingerprint\":\"f\"}}" for row in rows] + ["data: [DONE]", ""]
    assert transcript(http, TEXT, {"prompt": "a", "max_tokens": 2, "logprobs": 0}) == "\n\n".join(expected)


def test_no_partial_character_and_one_end(http: httpx.Client) -> None:
    text = http.post(CHAT, json={"messages": [USER], "stream": True}).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line and line != "data: [DONE]"]
    assert "\ufffd" not in text and text.count("data: [DONE]") == 1
    assert sum(choice["finish_reason"] is not None for chunk in chunks for choice in chunk["choices"]) == 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def wait_until(condition, seconds: float = 5.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_leaving_a_stream_aborts(rig: Rig, http: httpx.Client, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "!hang"}]} if path == CHAT else {"prompt": "!hang"}
    with http.stream("POST", path, json=body | {"stream": True, "request_id": "left" + path}) as answer:
        lines = answer.iter_lines()  # held on to: a forgotten iterator closes the connection
        assert next(lines).startswith("data: ")
        wait_until(lambda: any("left" + path in key for key in rig.engine.live))
    wait_until(lambda: any("left" + path in key for key in rig.engine.dropped))
    assert not any("left" + path in key for key in rig.engine.live | rig.state.active)


@pytest.mark.parametrize("prompt", ["!hang", ["!hang", "!hang 2", "x"]])
def test_leaving_a_whole_answer_aborts(rig: Rig, http: httpx.Client, prompt: object) -> None:
    num = 1 if isinstance(prompt, str) else 2
    before = len(rig.engine.dropped)
    with pytest.raises(httpx.ReadTimeout):
        http.post(TEXT, json={"prompt": prompt, "max_tokens": 20}, timeout=0.3)
    wait_until(lambda: len(rig.engine.dropped) == before + num)
    assert not rig.engine.live and not rig.state.active
    assert http.get("/load").json() == {"server_load": 0}


def test_one_failing_prompt_ends_its_siblings(rig: Rig, http: httpx.Client) -> None:
    assert http.post(TEXT, json={"prompt": ["!hang", "!fail"]}).status_code == 500
    wait_until(lambda: not rig.engine.live)


def test_a_client_that_does_not_read_disturbs_nobody(rig: Rig, http: httpx.Client) -> None:
    """Its socket fills up, its handler waits; others are served meanwhile; when it goes its request ends."""
    reply, rig.engine.reply = rig.engine.reply, "x" * 400
    try:
        host, port = rig.base_url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": ["y"] * 200, "n": 20, "max_tokens": 400, "stream": True, "logprobs": 5, "request_id": "slow"}).encode()
        with socket.create_connection((host, int(port))) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            wait_until(lambda: any("slow" in key for key in rig.engine.live))
            rig.engine.reply = "quick"
            assert http.post(TEXT, json={"prompt": "a", "max_tokens": 50}, timeout=10).json()["choices"][0]["text"] == "quick"
        wait_until(lambda: not any("slow" in key for key in rig.engine.live), 20)
    finally:
        rig.engine.reply = reply


def test_many_streams_at_once(rig: Rig) -> None:
    """Fifty clients, half of which leave early: every one that stays gets its whole answer."""
    texts: list[str] = []

    def read(i: int) -> None:
        with httpx.Client(base_url=rig.base_url, timeout=20) as http, http.stream(
            "POST", TEXT, json={"prompt": f"p{i}", "max_tokens": 60, "stream": True}
        ) as answer:
            got = ""
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    got += json.loads(line[6:])["choices"][0]["text"]
                    if i % 2 and len(got) > 3:
                        return
            texts.append(got)

    rig.engine.delay = 0.001
    threads = [threading.Thread(target=read, args=(i,)) for i in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.engine.delay = 0.0
    assert texts == [rig.engine.reply] * 25
    wait_until(lambda: not rig.engine.live)
    assert MODEL in rig.context.model_names
