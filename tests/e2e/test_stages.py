"""How often all threads meet in a decoding step: five times a layer with up to three rows, which every thread rounds for itself, nine times
with more, and four or five times around the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pagoda.base.types import SamplingParams
from tests.e2e.harness import engine, generate


@pytest.mark.parametrize("options", [{}, {"linear_activations": "int8", "kv_cache_dtype": "int8"}, {"quantization": "int8", "linear_activations": "int8"}], ids=str)
@pytest.mark.parametrize("streams", [1, 3, 8])
def test_stages_of_a_layer(default_model: Path, options: dict[str, Any], streams: int) -> None:
    local = engine(default_model, async_scheduling=False, **options)
    program = local.executor.runner._forward.program  # type: ignore[attr-defined]
    program.trace(True)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    generate(local, {str(i): [5 + i, 6, 7, 8] for i in range(streams)}, params)
    names = [name for name, _, _ in program.stage_times()]
    assert names.count("attention") == local.facts.num_layers == 30
    assert len(names) <= (5 if streams <= 3 else 9) * 30 + 5, names[:12]
