"""Ids, the log, the record of arrivals, what those who run the server may ask."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import httpx
import pytest

from pagoda.base.config import DeviceConfig, EngineConfig, ModelConfig, ServerConfig
from pagoda.base.errors import ConfigError
from pagoda.base.types import SamplingParams, StructuredOutputsParams
from pagoda.bench.client import Client, Exchange
from pagoda.bench.workload import Workload, make_requests
from pagoda.serve.admin import describe_server
from pagoda.serve.arrivals import ArrivalRecorder, body_fields
from pagoda.serve.openai_completions import CompletionRequest
from pagoda.serve.wire import decode_body, sampling_params
from tests.serve.fakes import Rig, byte_tokenizer
from tests.serve.test_streams import wait_until

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def test_every_answer_has_an_id(http: httpx.Client) -> None:
    mine = {"X-Request-Id": "mine"}
    for method, path, body in (
        ("GET", "/health", None), ("GET", "/nowhere", None), ("POST", TEXT, {"prompt": "a"}), ("POST", TEXT, {"prompt": "!bug"}),
        ("POST", TEXT, {"prompt": "a", "stream": True}), ("POST", TEXT, {}), ("DELETE", TEXT, None),
    ):  # fmt: skip
        assert http.request(method, path, json=body, headers=mine).headers["x-request-id"] == "mine", path
        given = [http.request(method, path, json=body).headers["x-request-id"] for _ in range(2)]
        assert given[0] != given[1] and len(given[0]) > 10
    assert http.get("/health", headers={"X-Request-Id": "x" * 300}).headers["x-request-id"].startswith("req-")


def test_failures_are_logged_with_their_id(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pagoda.serve"):
        http.post(TEXT, json={"prompt": "!bug"}, headers={"X-Request-Id": "find-me"})
        wait_until(lambda: "answered 500, X-Request-Id find-me" in caplog.text)


def test_the_log_tells_arrival_and_end(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(enable_log_requests=True).make_ready()
    with rig.running(), httpx.Client(base_url=rig.base_url) as http, caplog.at_level(logging.INFO, "pagoda.serve"):
        http.post(TEXT, json={"prompt": "hello", "max_tokens": 7, "request_id": "told"})
        wait_until(lambda: "ended: length, 5 prompt tokens, 7 output tokens" in caplog.text)
        http.post(TEXT, json={"prompt": "!fail", "request_id": "bad"})
        wait_until(lambda: "ended: left or failed" in caplog.text)
    assert "hello" not in caplog.text


def test_http_requests_are_counted(http: httpx.Client) -> None:
    def counts() -> dict[str, float]:
        lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith("http_requests_total")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = counts()
    http.post(TEXT, json={"prompt": "a"})
    http.post(TEXT, json={})
    http.get("/v1/models/alias")
    http.get("/no/such/thing")
    after = counts()
    grown = {key for key in after if after[key] > before.get(key, 0)}
    label = 'http_requests_total{handler="%s",method="%s",status="%s"}'
    assert {
        label % (TEXT, "POST", "2xx"), label % (TEXT, "POST", "4xx"), label % ("/v1/models/{model}", "GET", "2xx"), label % ("none", "GET", "4xx"),
    } <= grown  # fmt: skip
    assert 'http_request_duration_seconds_count{handler="/v1/completions",method="POST"}' in http.get("/metrics").text


def test_server_info_hides_secrets() -> None:
    config = EngineConfig(model=ModelConfig(model="m", hf_token="hf_secret"), device=DeviceConfig(num_threads=2))
    found = describe_server(config, ServerConfig(api_key=("sesame",), port=1), model="m")
    text = json.dumps(found)
    assert "sesame" not in text and "hf_secret" not in text
    assert found["config"]["server"]["api_key"] == "***" and found["config"]["device"]["num_threads"] == 2 and found["model"] == "m"
    assert describe_server(EngineConfig(), ServerConfig())["config"]["model"]["hf_token"] is None


def test_admin_routes(rig: Rig, http: httpx.Client) -> None:
    assert http.get("/server_info").json() == rig.context.server_info
    assert http.post("/reset_prefix_cache").json() == {"success": True}
    assert http.get("/reset_prefix_cache").status_code == 405
    with Rig(api_key=("k",)).make_ready().running() as guarded, httpx.Client(base_url=guarded.base_url) as stranger:
        assert stranger.get("/server_info").status_code == stranger.post("/reset_prefix_cache").status_code == 401


# ---- the record


def test_a_workload_is_recorded_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "arrivals.jsonl"
    with Rig(record_arrivals=str(path)).make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        assert rig.state.recorder is not None
        rig.state.recorder.begin({"max_num_seqs": 4})
        http.post(TEXT, json={"prompt": ["ab", "c"], "max_tokens": 5, "temperature": 0.5, "seed": 3, "n": 2})
        http.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}], "stream": True, "top_k": 7, "cache_salt": "s"})
        http.post(TEXT, json={"prompt": "!fail", "max_tokens": 9})
        http.post(TEXT, json={"temperature": 1})
        wait_until(lambda: path.read_text().count("output_tokens") == 4)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["config"] == {"max_num_seqs": 4}
    tokenizer = byte_tokenizer()
    requests = make_requests(Workload(dataset_name="recorded", dataset_path=str(path)), tokenizer, seed=0, max_model_len=10**6)
    assert sorted(tokenizer.decode(r.prompt_token_ids) for r in requests) == ["!fail", "ab", "c", "user: hi\nassistant: "]
    by_text = {tokenizer.decode(r.prompt_token_ids): r for r in requests}
    assert by_text["ab"].output_len == 5 and by_text["ab"].fields == {"temperature": 0.5, "seed": 3, "n": 2}
    chat = by_text["user: hi\nassistant: "]
    assert chat.output_len == len(rig.engine.reply.encode()) + 1, "as long as it was"
    assert chat.fields == {"top_k": 7, "cache_salt": "s"}
    assert by_text["!fail"].output_len == 9, "no end was recorded: up to max_tokens"
    times = [r.at for r in requests]
    assert times[0] == 0.0 and times == sorted(times)  # type: ignore[type-var]


def test_recorded_fields_mean_the_same_to_a_server() -> None:
    given = SamplingParams(
        temperature=0.5, top_p=0.9, stop=["x"], logit_bias={3: 1.5}, max_tokens=7, xtc_probability=0.5, dry_multiplier=1.0,
        structured_outputs=StructuredOutputsParams(regex="a+"), extra_args={"k": 1}, seed=9,
    )  # fmt: skip
    body, warnings = decode_body(json.dumps({"prompt": "a", **body_fields(given)}).encode(), CompletionRequest)
    assert warnings == []
    again = sampling_params(body, {}, max_tokens=7, structured_outputs=given.structured_outputs)
    again.output_kind = given.output_kind
    assert again == given


def test_a_record_that_cannot_be_written_is_said_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--record-arrivals"):
        ArrivalRecorder(str(tmp_path / "no" / "where"))


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    for content in ('{"prompt_token_ids": [1]}', '{"a": 1}', "[3]"):
        (tmp_path / "f").write_text(content)
        with pytest.raises(ConfigError, match=r"recorded|no prompts"):
            make_requests(Workload(dataset_name="recorded", dataset_path=str(tmp_path / "f")), byte_tokenizer(), seed=0, max_model_len=99)


def test_a_record_with_beams_is_sent_whole(tmp_path: Path) -> None:
    path = tmp_path / "f"
    rows = [{"id": "a", "at": 1.0, "prompt_token_ids": [1, 2], "fields": {"n": 2, "use_beam_search": True, "temperature": 0.0, "stream": False, "max_tokens": 4}}]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"id": "a", "output_tokens": 8, "finish_reason": "length"}]))
    request = make_requests(Workload(dataset_name="recorded", dataset_path=str(path)), byte_tokenizer(), seed=0, max_model_len=99)[0]
    assert request.output_len == 4 and request.fields == {"n": 2, "use_beam_search": True, "temperature": 0.0, "stream": False}
    with Rig().make_ready().running() as rig:
        client = Client(rig.base_url, backend="openai", model="alias")

        async def go() -> Exchange:
            try:
                return await client.send(request.prompt_token_ids, 2, **request.fields, max_tokens=request.output_len)
            finally:
                await client.close()

        seen = asyncio.run(go())
        assert seen.is_ok and seen.output_len == 8 and seen.text == rig.engine.reply[:4]
