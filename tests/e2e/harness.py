"""Runs whole requests through a core in this process, and keeps tokens and logprobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pagoda.base.config import config_from_kwargs
from pagoda.base.types import FinishReason, GenerateRequest, SamplingParams
from pagoda.executor.launch import LocalEngine, build_engine

SMALL_CACHE = 64 << 20


class Answer(NamedTuple):
    token_ids: list[int]
    logprobs: list[list[float]]  # per token: its own, then the top ones
    finish_reason: FinishReason | None
    num_cached_tokens: int
    num_preemptions: int


def engine(model: Path | str | None, **kwargs: Any) -> LocalEngine:
    defaults: dict[str, Any] = dict(device="cpu", kv_cache_memory_bytes=SMALL_CACHE, max_model_len=512)
    return build_engine(config_from_kwargs(None if model is None else str(model), **{**defaults, **kwargs}))


def generate(engine: LocalEngine, prompts: dict[str, list[int]], params: SamplingParams | dict[str, SamplingParams]) -> dict[str, Answer]:
    """Adds all requests at once and runs until every one has ended; then nothing may be owned any more."""
    core = engine.core
    for name, ids in prompts.items():
        chosen = params[name] if isinstance(params, dict) else params
        core.add(GenerateRequest(request_id=name, prompt_token_ids=ids, params=chosen.clone()))
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    logprobs: dict[str, list[list[float]]] = {name: [] for name in prompts}
    ends: dict[str, Any] = {}
    cached: dict[str, int] = {}
    while core.has_work():
        for out in core.step():
            assert out.error is None, out.error
            tokens[out.request_id] += out.new_token_ids
            logprobs[out.request_id] += [position.logprobs for position in out.logprobs or []]
            cached[out.request_id] = max(cached.get(out.request_id, 0), out.num_cached_tokens)
            if out.finish_reason is not None:
                assert out.request_id not in ends, "a request ended twice"
                ends[out.request_id] = out
    core.check_integrity()
    return {
        name: Answer(tokens[name], logprobs[name], ends[name].finish_reason, cached[name], ends[name].metrics.num_preemptions)
        for name in prompts
    }
