"""Probes, figures, tokenizer routes and the schema."""

from __future__ import annotations

import logging
import re

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pagoda.engine.stats import EngineStats, StatsRecorder
from pagoda.serve.app import routes
from pagoda.serve.context import ServerState
from pagoda.serve.metrics import ServerMetrics, StatsLog
from tests.serve.fakes import MAX_MODEL_LEN, MODEL, Rig

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def test_states_of_health() -> None:
    rig = Rig()
    with rig.running(), httpx.Client(base_url=rig.base_url) as http:
        for path in ("/health", "/ready", "/v1/models"):
            assert http.get(path).status_code == 503
        answer = http.post(CHAT, json={"messages": [USER]})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "loading" and answer.headers["retry-after"]
        assert http.get("/version").status_code == 200 and http.get("/metrics").status_code == 200
        rig.make_ready()
        assert [http.get(path).status_code for path in ("/health", "/ready", "/ping")] == [200, 200, 200]
        rig.engine.is_dead = True
        assert [http.get(path).status_code for path in ("/health", "/ready")] == [503, 503]
        rig.engine.is_dead = False
        rig.state.drain()
        assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 503]
        assert http.post(TEXT, json={"prompt": "a"}).json()["error"]["code"] == "shutting_down"
        rig.state.fail("no memory")
        assert http.get("/health").json()["error"]["message"] == "the engine did not start: no memory"


def test_what_the_server_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """--response-role, --root-path, --enable-log-requests."""
    rig = Rig(response_role="bard", root_path="/llm", enable_log_requests=True, api_key=("k",)).make_ready()
    with rig.running(), httpx.Client(base_url=rig.base_url) as http, caplog.at_level(logging.INFO, "pagoda.serve"):
        headers = {"Authorization": "Bearer k"}
        body = {"messages": [USER], "request_id": "logged", "temperature": 0.125}
        answer = http.post(CHAT, json=body, headers=headers).json()
        assert answer["choices"][0]["message"]["role"] == "bard"
        assert http.get("/health").status_code == 200 and http.get("/v1/models").status_code == 401
    assert "chatcmpl-logged" in caplog.text and "temperature=0.125" in caplog.text and "hi" not in caplog.text.split("chatcmpl-logged")[1]


def test_tokenize(http: httpx.Client) -> None:
    answer = http.post("/tokenize", json={"model": MODEL, "prompt": "aä", "return_token_strs": True}).json()
    assert answer["count"] == 3 == len(answer["tokens"]) and answer["max_model_len"] == MAX_MODEL_LEN
    assert answer["token_strs"][0] == "a"
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "aä"}
    chat = http.post("/tokenize", json={"messages": [USER]}).json()
    assert chat["count"] == len("user: hi\nassistant: ") and chat["token_strs"] is None
    bare = http.post("/tokenize", json={"messages": [USER], "add_generation_prompt": False}).json()
    assert bare["count"] == len("user: hi")
    for path, body in (
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": [USER]}), ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [10**6]}), ("/detokenize", {"tokens": ["a"]}), ("/detokenize", {}),
    ):  # fmt: skip
        assert http.post(path, json=body).status_code == 400, (path, body)
    assert http.post("/tokenize", json={"model": "no", "prompt": "a"}).status_code == 404


def test_tokenizer_info() -> None:
    """Only where it is wanted; objects of added tokens become texts, paths stay here, the template is the one in force."""
    rig = Rig(enable_tokenizer_info_endpoint=True).make_ready()
    rig.template.sources = {"default": "{{ messages }}"}
    token = {"__type": "AddedToken", "content": "<s>", "special": True}
    rig.tokenizer.config = {
        "bos_token": token, "added_tokens_decoder": {"1": token}, "vocab_file": "/secret", "extra": [token, 3], "chat_template": "old",
    }  # fmt: skip
    with rig.running(), httpx.Client(base_url=rig.base_url) as http:
        assert http.get("/tokenizer_info").json() == {
            "bos_token": "<s>", "added_tokens_decoder": {"1": "<s>"}, "extra": ["<s>", 3], "chat_template": "{{ messages }}",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }  # fmt: skip
    with Rig().make_ready().running() as closed:
        assert httpx.get(closed.base_url + "/tokenizer_info").status_code == 404


def some_stats() -> EngineStats:
    recorder = StatsRecorder(MAX_MODEL_LEN, 99)
    for seconds, times in ((0.001, 1), (0.0015, 2), (99.0, 1)):
        recorder.stats.histograms["inter_token_latency_seconds"].observe(seconds, times)
    return msgspec.structs.replace(
        recorder.stats, num_requests_running=2, num_requests_waiting=3, num_requests_waiting_deferred=1, kv_cache_usage_perc=0.25,
        prompt_tokens=500, prompt_tokens_cached=50, generation_tokens=1000, prefix_cache_queries=200, prefix_cache_hits=50,
        request_success={"stop": 4}, admission_rejections={"QueueFull": 2},
    )  # fmt: skip


def test_metrics() -> None:
    """Every figure of the core is there under vLLM's name, and the reference parser understands it."""
    with Rig().make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        rig.engine.core_stats = some_stats()
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name, next(iter(labels.values()), "")] = sample.value
            if sample.name.startswith("vllm:num_requests"):
                assert sample.labels["model_name"] == MODEL and sample.labels["engine"] == "0"
    assert found["vllm:num_requests_running", ""] == 2 and found["vllm:num_requests_waiting", ""] == 3
    assert found["vllm:num_requests_waiting_by_reason", "deferred"] == 1
    assert found["vllm:kv_cache_usage_perc", ""] == 0.25
    assert found["vllm:prompt_tokens_total", ""] == 500 and found["vllm:generation_tokens_total", ""] == 1000
    assert found["vllm:prompt_tokens_by_source_total", "local_compute"] == 450
    assert found["vllm:request_success_total", "stop"] == 4 and found["vllm:request_success_total", "abort"] == 0
    assert found["vllm:admission_rejections_total", "QueueFull"] == 2
    buckets = [found["vllm:inter_token_latency_seconds_bucket", le] for le in ("0.001", "0.0025", "80.0", "+Inf")]
    assert buckets == [1, 3, 3, 4] and found["vllm:inter_token_latency_seconds_count", ""] == 4
    assert found["vllm:inter_token_latency_seconds_sum", ""] == 0.001 + 2 * 0.0015 + 99.0
    assert ("vllm:cache_config_info", "16") in found and "process_resident_memory_bytes" in answer.text
    for name in some_stats().histograms:
        assert (f"vllm:{name}_count", "") in found, name


def test_stats_line() -> None:
    now = [0.0]
    metrics = ServerMetrics()
    log = StatsLog(metrics, clock=lambda: now[0])
    assert log.line() is None
    now[0] += 10
    metrics.update_core(some_stats())
    assert log.line() == (
        "Engine 000: Avg prompt throughput: 50.0 tokens/s, Avg generation throughput: 100.0 tokens/s, Running: 2 reqs, "
        "Waiting: 3 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )
    now[0] += 10
    metrics.update_core(msgspec.structs.replace(some_stats(), num_requests_running=0, num_requests_waiting=0))
    assert log.line() is None


def references(node: object) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    if isinstance(node, list):
        return set().union(*(references(value) for value in node))
    return set()


def test_openapi(http: httpx.Client) -> None:
    """Every route is there; every reference resolves; every field of the structs is described; errors have a body."""
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1") and document["info"]["title"] == "Pagoda"
    docs = [row.doc for row in routes(ServerState(Rig().state.config))]
    assert set(document["paths"]) == {doc.path for doc in docs}
    for doc in docs:
        assert set(document["paths"][doc.path]) == {method.lower() for method in doc.methods}
    schemas = document["components"]["schemas"]
    assert all(ref.startswith("#/components/schemas/") and ref.rpartition("/")[2] in schemas for ref in references(document))
    chat = schemas["ChatCompletionRequest"]
    assert {"messages", "temperature", "top_k", "stream_options"} <= set(chat["properties"]) and chat["required"] == ["messages"]
    assert chat["properties"]["messages"]["items"] == {"$ref": "#/components/schemas/ChatMessage"}
    post = document["paths"][CHAT]["post"]
    assert set(post["responses"]) == {"200", "400", "401", "404", "413", "429", "500", "503", "504"}
    assert "text/event-stream" in post["responses"]["200"]["content"]
    ids = [op["operationId"] for path in document["paths"].values() for op in path.values()]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[a-z0-9_.]+", name) for name in ids)


def test_openai_fields_are_known(http: httpx.Client, shared_data) -> None:  # type: ignore[no-untyped-def]
    """No field of OpenAI's own schema is unknown here: it is honoured, refused by name, or known to have no effect."""
    import gzip
    import json

    from pagoda.serve.openai_chat import ChatCompletionRequest
    from pagoda.serve.openai_completions import CompletionRequest
    from pagoda.serve.wire import NO_EFFECT, UNSUPPORTED

    schemas = json.loads(gzip.decompress((shared_data / "openapi" / "openai_openapi.json.gz").read_bytes()))["components"]["schemas"]

    def fields(schema: dict[str, object]) -> set[str]:
        names = set(schema.get("properties", {}))  # type: ignore[call-overload]
        for part in schema.get("allOf", []):  # type: ignore[attr-defined]
            names |= fields(schemas[part["$ref"].rpartition("/")[2]] if "$ref" in part else part)
        return names

    for name, kind in (("CreateChatCompletionRequest", ChatCompletionRequest), ("CreateCompletionRequest", CompletionRequest)):
        known = set(kind.__struct_fields__) | NO_EFFECT | UNSUPPORTED.keys()
        assert len(fields(schemas[name])) > 10 and fields(schemas[name]) <= known, fields(schemas[name]) - known
