"""`pagoda bench engine`: shapes without weights, and a step's bandwidth beside the memory's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagoda.base.config import config_from_kwargs
from pagoda.base.errors import ConfigError
from pagoda.bench import engine
from pagoda.bench.shapes import SHAPES
from pagoda.cli.main import main
from pagoda.executor.launch import describe_model


def check(found: dict[str, Any], requests: int, output_len: int) -> None:
    assert found["total_output_tokens"] == requests * output_len
    assert found["output_tokens_per_second"] == pytest.approx(requests * output_len / found["elapsed_time"])
    assert 0 < found["median_ttft_ms"] <= 1e3 * found["elapsed_time"] and 0 < found["median_itl_ms"] <= found["p99_itl_ms"]
    assert found["host_ms"] > 0 and 0 < found["step_ms"] <= 1e3 * found["elapsed_time"]
    assert found["bandwidth_share"] == pytest.approx(found["achieved_gb_s"] / found["ceiling_gb_s"]) and found["ceiling_gb_s"] == 50.0


def test_a_shape_on_the_cpu_by_the_command(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    asked = ["--shape", "tiny", "--requests", "3", "--input-len", "9", "--output-len", "6", "--ceiling-gb-s", "50", "--device", "cpu"]
    assert main(["bench", "engine", *asked, "--kv-cache-memory-bytes", "8m", "--output-json", str(file)]) == 0
    check(json.loads(file.read_text()), 3, 6)


def test_a_shape_on_the_null_device() -> None:
    """The GPU's path, with the bandwidth handed in; sampled, so that every kind of kernel is started."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=0: the null device needs the interpreter")
    config = config_from_kwargs(None, device="null", dtype="float32", max_num_batched_tokens=16, graph_capture_seconds=0)
    report = engine.measure(engine.Options(shape="tiny", requests=2, input_len=6, output_len=4, ceiling_gb_s=50.0), config)
    check(report.data(), 2, 4)
    assert any("workspace" in line for line in report.notes)


def test_the_shapes_are_those_of_the_models(tmp_path: Path) -> None:
    """Parameters counted from the description, without weights."""
    wanted = {"llama-3.1-8b": 8.03e9, "qwen3-8b": 8.19e9, "qwen3-0.6b": 0.596e9}
    for name, count in wanted.items():
        source = describe_model(config_from_kwargs(str(engine.write_shape(name, tmp_path)), load_format="dummy", device="cpu"))[0]
        assert source.spec.facts().num_parameters == pytest.approx(count, rel=0.01), name
    assert set(wanted) < set(SHAPES)


def test_what_cannot_be_measured_is_said() -> None:
    for options, kwargs, message in (
        ({"shape": "lama"}, {}, "`--shape lama` is not one of"),
        ({"shape": "tiny"}, {"model": "x"}, "stands for a model"),
        ({"requests": 0}, {}, "at least 1"),
        ({"shape": "tiny", "input_len": 100}, {"max_model_len": 50, "device": "cpu", "kv_cache_memory_bytes": 8 << 20}, "more than the context of 50"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.measure(engine.Options(**options), config_from_kwargs(kwargs.pop("model", None), **kwargs))  # type: ignore[arg-type]
