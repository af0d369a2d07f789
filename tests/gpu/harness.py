"""Tiny engines on the null device, or on the GPU where the tests are told to use one (`make gpu-check`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pagoda.executor.launch import LocalEngine
from pagoda.worker.device_runner import DeviceRunner
from tests.e2e.harness import engine
from tests.models import tiny

TINY: dict[str, Any] = dict(
    device="null", dtype="float32", max_model_len=96, max_num_seqs=4, max_num_batched_tokens=24, num_gpu_blocks_override=40
)


def checkpoint(name: str, folder: Path, **changes: Any) -> Path:
    return tiny.make(name, folder, **{"num_hidden_layers": 2, **changes})[0]


def null_engine(path: Path, **kwargs: Any) -> LocalEngine:
    return engine(path, **{**TINY, **kwargs})


def cpu_engine(path: Path, **kwargs: Any) -> LocalEngine:
    """The same model on the CPU, in float32."""
    return engine(path, **{**TINY, "device": "cpu", **kwargs})


def runner_of(local: LocalEngine) -> DeviceRunner:
    runner = local.executor.runner
    assert isinstance(runner, DeviceRunner)
    return runner
