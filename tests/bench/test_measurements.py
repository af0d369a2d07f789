"""Every measurement runs on the smallest real model there is; what it finds is checked where it can be known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from pagoda.base.config import EngineConfig, config_from_kwargs
from pagoda.base.errors import ConfigError, RequestFailed
from pagoda.bench import latency, quality, serve, startup, throughput
from pagoda.bench.server_process import running_server
from pagoda.cli.main import main
from pagoda.executor.launch import build_engine

SMALL = {"max_model_len": 256, "kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> str:
    return str(shared_data / "weights/stories260K-hf")


@pytest.fixture(scope="module")
def config(stories: str) -> EngineConfig:
    return config_from_kwargs(stories, **SMALL)


def test_throughput(config: EngineConfig) -> None:
    found = throughput.measure(throughput.Options(num_prompts=20, input_len=30, output_len=10, n=2), config).data()
    assert (found["num_requests"], found["total_input_tokens"], found["total_output_tokens"]) == (20, 600, 400)
    assert found["tokens_per_second"] == pytest.approx(1000 / found["elapsed_time"])
    assert found["requests_per_second"] == pytest.approx(20 / found["elapsed_time"])


def test_throughput_meets_the_prefix_cache(config: EngineConfig) -> None:
    options = throughput.Options(num_prompts=4, input_len=16, output_len=2, random_prefix_len=64)
    assert throughput.measure(options, config).data()["num_cached_tokens"] >= 3 * 64


def test_latency(config: EngineConfig) -> None:
    found = latency.measure(latency.Options(input_len=20, output_len=8, batch_size=4, num_iters=3, num_iters_warmup=1), config).data()
    assert len(found["latencies"]) == 3 and min(found["latencies"]) > 0
    assert found["p10_latency"] <= found["p50_latency"] <= found["p99_latency"] <= max(found["latencies"])
    assert 0 < found["median_ttft_ms"] < 1e3 * max(found["latencies"]) and found["decode_tokens_per_second"] > 0


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_serve_starts_its_own_server(config: EngineConfig, backend: Any) -> None:
    options = serve.Options(num_prompts=6, input_len=20, output_len=8, backend=backend, max_concurrency=3, request_rate=200.0, save_detailed=True)
    report = serve.measure(options, config)
    found = report.data()
    assert report.is_ok and (found["completed"], found["failed"], found["total_output_tokens"]) == (6, 0, 48)
    assert 0 < found["median_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    assert [one["output_len"] for one in found["requests"]] == [8] * 6
    assert "api_key" not in found["options"]


def test_serve_measures_a_given_server(config: EngineConfig, stories: str, tmp_path: Path) -> None:
    with running_server(config) as server:
        words = ["bench", "serve", stories, "--base-url", server.base_url, "--num-prompts", "4", "--output-len", "4"]
        long = ["--input-len", "300", "--num-warmups", "0", "--output-json", str(tmp_path / "long.json")]
        assert main([*words, *long]) == 1, "prompts longer than the context fail"
        failed = json.loads((tmp_path / "long.json").read_text())
        assert main([*words, "--input-len", "8", "--output-json", str(tmp_path / "s.json")]) == 0
        found = json.loads((tmp_path / "s.json").read_text())
    assert found["completed"] == 4 and found["errors"] == []
    assert failed["completed"] == 0 and failed["failed"] == 4 and "256" in failed["errors"][0]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.base_url}/ready", trust_env=False)


def test_serve_refuses_flags_of_another_server(config: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"`--kv-cache-memory-bytes` is for a server started here"):
        serve.measure(serve.Options(base_url="http://127.0.0.1:1"), config)


def test_a_server_that_does_not_start_says_why(stories: str) -> None:
    with pytest.raises(RequestFailed, match="max-model-len"), running_server(config_from_kwargs(stories, max_model_len=10**9)):
        pass


def test_startup(config: EngineConfig) -> None:
    found = startup.measure(startup.Options(num_iters=1, num_iters_warmup=0), config).data()
    assert 0 <= found["median_import_s"] < found["median_help_s"] < found["median_complete_first_token_s"]
    assert 0 < found["median_serve_ready_s"] < found["median_serve_first_token_s"]
    assert {len(values) for values in found["seconds"].values()} == {1}


def test_quality_of_the_reference_itself_is_perfect(stories: str) -> None:
    config = config_from_kwargs(stories, dtype="float32", max_model_len=256)
    found = quality.measure(quality.Options(num_tokens=60, chunk_len=24), config).data()
    assert found["num_positions"] == 60  # every chunk has the model's <s> in front
    assert found["perplexity_ratio"] == 1.0 and found["max_kl_divergence"] == pytest.approx(0, abs=1e-6)
    assert found["same_top_token"] == 100.0 and found["rms_delta_p"] == 0.0


def test_quality_of_bfloat16_is_close_but_not_equal(stories: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Once upon a time, there was a little girl named Lily. She loved to play outside in the park.")
    config = config_from_kwargs(stories, dtype="bfloat16", max_model_len=256)
    found = quality.measure(quality.Options(text_file=str(tmp_path / "text")), config).data()
    assert 0 < found["mean_kl_divergence"] < 0.01
    assert found["perplexity_ratio"] == pytest.approx(1, abs=0.05) and found["perplexity_ratio"] != 1
    assert found["perplexity"] < 10, "the model was trained on such texts"


def test_scores_are_those_of_transformers(stories: str, shared_data: Path) -> None:
    items = json.loads((shared_data / "reference/stories260k_fp32_greedy.json").read_text())["items"]
    engine = build_engine(config_from_kwargs(stories, dtype="float32", **SMALL))
    try:
        for item in items:
            if len(ids := item["prompt_ids"]) < 2:
                continue
            logp_TV = quality.score(engine, ids)
            assert np.exp(logp_TV.astype(np.float64)).sum(axis=1) == pytest.approx(1, abs=1e-4)
            own = logp_TV[np.arange(len(ids) - 1), ids[1:]]
            assert own == pytest.approx(np.array(item["prompt_logprobs"][1:]), abs=2e-3)
    finally:
        engine.close()


def test_quality_of_quantized_blocks(default_model: Path) -> None:
    found = quality.measure(quality.Options(num_tokens=24, chunk_len=12), config_from_kwargs(str(default_model))).data()
    assert "q4_1" in found["weights"] and "f32" in found["weights_reference"] and "q" not in found["weights_reference"]
    assert 0 < found["mean_kl_divergence"] < 0.05 and found["num_positions"] == 22


def test_quality_against_another_vocabulary(stories: str, default_model: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary"):
        quality.measure(quality.Options(reference=stories), config_from_kwargs(str(default_model)))


def test_chunks() -> None:
    assert quality.chunks_of(range(7), 3) == [[0, 1, 2], [3, 4, 5]]  # type: ignore[arg-type]
    assert quality.chunks_of(range(8), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (latency, latency.Options(batch_size=0)),
        (throughput, throughput.Options(num_prompts=0)),
        (throughput, throughput.Options(input_len=300)),
        (serve, serve.Options(goodput=("tfft:3",))),
        (serve, serve.Options(goodput=("ttft",))),
        (serve, serve.Options(metric_percentiles="90;99")),
        (serve, serve.Options(metric_percentiles="101")),
        (startup, startup.Options(num_iters=0)),
        (quality, quality.Options(chunk_len=1)),
        (quality, quality.Options(text_file="/nowhere/none")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_options_that_cannot_be(module: Any, options: Any, config: EngineConfig) -> None:
    with pytest.raises(ConfigError):
        module.measure(options, config)
