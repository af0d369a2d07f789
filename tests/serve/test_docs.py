"""docs/http-api.md names every route, request field and metric."""

from __future__ import annotations

import re
from pathlib import Path

from pagoda.engine.stats import StatsRecorder
from pagoda.serve.app import routes
from pagoda.serve.context import ServerState
from pagoda.serve.metrics import ServerMetrics
from pagoda.serve.openai_chat import ChatCompletionRequest
from pagoda.serve.openai_completions import CompletionRequest
from tests.serve.fakes import Rig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")


def test_every_route_is_documented() -> None:
    state = ServerState(Rig(enable_tokenizer_info_endpoint=True).state.config)
    listed = {f"{method} {row.doc.path}" for row in routes(state) for method in row.doc.methods}
    told = set(re.findall(r"`((?:GET|POST) /[^`]*)`", PAGE))
    assert listed == told


def test_every_request_field_is_documented() -> None:
    words = set(re.findall(r"`(\w+)`", PAGE))
    fields = {*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert fields <= words, fields - words


def test_every_metric_is_documented() -> None:
    metrics = ServerMetrics()
    metrics.set_model("m", block_size=16)
    metrics.update_core(StatsRecorder(100, 9).stats)
    names = {family.name + ("_total" if family.type == "counter" else "") for family in metrics.collect()}
    told = set(re.findall(r"^\| `((?:vllm:|pagoda:|http_)\w+)`", PAGE, re.MULTILINE))
    assert names == told, names ^ told
