"""Probes, figures, tokenizer routes and the schema."""

from __future__ import annotations

import re
from types import SimpleNamespace

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pagoda.serve.app import routes
from pagoda.serve.context import ServerState
from pagoda.serve.metrics import Histogram, ServerMetrics, StatsLog
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


def samples(text: str) -> dict[tuple[str, str], float]:
    """(name, the label that matters) -> value, by the reference parser."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, sample.labels.get("finished_reason", sample.labels.get("le", ""))] = sample.value
    return found


def test_metrics() -> None:
    with Rig().make_ready().running() as rig, httpx.Client(base_url=rig.base_url) as http:
        rig.state.metrics.update_core(core_stats(generation_tokens=7))
        rig.state.metrics.set_cache_config(block_size=16, num_gpu_blocks=100)
        http.post(TEXT, json={"prompt": "abcd", "max_tokens": 5})
        http.post(TEXT, json={"prompt": "abcd", "max_tokens": 5, "stream": True})
        http.post(TEXT, json={"prompt": "!fail", "max_tokens": 5})
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        assert f'vllm:num_requests_running{{engine="0",model_name="{MODEL}"}} 2.0' in answer.text
        found = samples(answer.text)
        assert found["vllm:generation_tokens_total", ""] == 7
        assert found["vllm:request_success_total", "length"] == 2 and found["vllm:request_success_total", "abort"] == 1
        assert found["vllm:e2e_request_latency_seconds_count", ""] == 2
        assert found["vllm:time_to_first_token_seconds_count", ""] == 2
        assert found["vllm:inter_token_latency_seconds_count", ""] == 8
        assert found["vllm:request_queue_time_seconds_sum", ""] > 0
        assert found["vllm:request_prompt_tokens_sum", ""] == 8 and found["vllm:request_generation_tokens_sum", ""] == 10
        assert found["vllm:request_prompt_tokens_bucket", "2.0"] == 0 and found["vllm:request_prompt_tokens_bucket", "5.0"] == 2
        assert 'block_size="16"' in answer.text and "process_resident_memory_bytes" in answer.text


def core_stats(**changes: float) -> SimpleNamespace:
    values = dict.fromkeys(("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "num_preemptions"), 0)
    return SimpleNamespace(**(values | {"num_requests_running": 2, "num_requests_waiting": 1, "kv_cache_usage": 0.25} | changes))


def test_histogram_buckets_are_cumulative_and_inclusive() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((1.0, 1), (1.5, 2), (9.0, 1)):
        histogram.observe(value, times)
    assert histogram.buckets() == ([("1.0", 1), ("2.0", 3), ("+Inf", 4)], 13.0)


def test_stats_line() -> None:
    now = [0.0]
    metrics = ServerMetrics()
    log = StatsLog(metrics, clock=lambda: now[0])
    assert log.line() is None
    now[0] += 10
    metrics.update_core(core_stats(prompt_tokens=500, generation_tokens=1000, prefix_cache_queries=200, prefix_cache_hits=50))
    assert log.line() == (
        "Engine 000: Avg prompt throughput: 50.0 tokens/s, Avg generation throughput: 100.0 tokens/s, Running: 2 reqs, "
        "Waiting: 1 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )
    now[0] += 10
    metrics.update_core(core_stats(prompt_tokens=500, generation_tokens=1000, num_requests_running=0, num_requests_waiting=0))
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
    assert set(post["responses"]) == {"200", "400", "401", "404", "413", "500", "503"}
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
