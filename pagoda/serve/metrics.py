"""Prometheus figures under vLLM's names, so that its dashboards work unchanged; and the line every 10 seconds.

The core counts where things happen (`engine/stats.py`); here its figures are only written down. They are fetched when somebody
scrapes, so serving a token costs nothing here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from logging import DEBUG, INFO
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pagoda.base.log import get_logger
from pagoda.engine.stats import EngineStats, Histogram
from pagoda.serve.figures import FrontFigures, SharedFigures
from pagoda.serve.http_figures import families

__all__ = ["ServerMetrics", "StatsLog"]

logger = get_logger("serve")

_PREFIX = "vllm:"
_ENGINE = "0"  # one engine per server in this version
_GAUGES = {
    "num_requests_running": "requests in the current batch",
    "num_requests_waiting": "requests waiting to run",
    "kv_cache_usage_perc": "share of KV blocks in use, 1 is full",
}
_COUNTERS = {
    "prefix_cache_queries": "tokens looked up in the prefix cache",
    "prefix_cache_hits": "tokens found in the prefix cache",
    "num_preemptions": "requests that lost their KV blocks, to be recomputed",
    "prompt_tokens": "prompt tokens of requests that began to answer",
    "prompt_tokens_cached": "of these, tokens found in the prefix cache",
    "generation_tokens": "tokens generated",
    "corrupted_requests": "samples whose logits were not finite",
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": "from a request's arrival to its first token",
    "inter_token_latency_seconds": "between two tokens of one sample",
    "request_time_per_output_token_seconds": "mean time per token after the first, per sample",
    "e2e_request_latency_seconds": "from arrival to the end of a sample",
    "request_queue_time_seconds": "waiting before the first step",
    "request_inference_time_seconds": "from the first step to the last token",
    "request_prefill_time_seconds": "from the first step to the first token",
    "request_decode_time_seconds": "from the first token to the last",
    "request_prompt_tokens": "prompt tokens of a sample",
    "request_generation_tokens": "generated tokens of a sample",
    "request_max_num_generation_tokens": "generated tokens of a request's longest sample",
    "request_prefill_kv_computed_tokens": "prompt tokens computed, not found in the prefix cache",
    "request_params_max_tokens": "max_tokens of a request",
    "request_params_n": "samples of a request",
    "request_num_preemptions": "preemptions of a sample",
    "iteration_tokens_total": "tokens computed in a step",
}
_IDLE_COUNTERS = {
    "external_prefix_cache_queries": "tokens looked up in other servers' caches: this version asks none",
    "external_prefix_cache_hits": "tokens found there",
    "mm_cache_queries": "images and sounds looked up: this version takes text only",
    "mm_cache_hits": "images and sounds found",
}
"""Counters that vLLM's server always has; they stand at 0 until their feature is there."""
_SLEEP_STATES = {"awake": 1, "weights_offloaded": 0, "discard_all": 0}
_REASONS = ("stop", "length", "abort", "error")


class ServerMetrics:
    """What is known of the core, and how it is written down. One event loop writes and reads: no locks."""

    def __init__(self, figures_dir: str | None = None, front: int = 0) -> None:
        """`figures_dir`: where several API processes leave their figures for each other; `front`: which of them this is."""
        self.own = FrontFigures()
        self.core = EngineStats()
        self._model_name = ""
        self._cache_config: dict[str, str] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self.shared = None if figures_dir is None else SharedFigures(figures_dir, front, self.own)
        for collector in (ProcessCollector, PlatformCollector, GCCollector) if self.shared is None else ():
            collector(registry=self._registry)  # of one process: with several they would jump between scrapes

    def set_model(self, name: str, **cache_config: object) -> None:
        """Label values, and those of `cache_config_info` (block_size, num_gpu_blocks, ...), once the model is known."""
        self._model_name = name
        self._cache_config = {key: str(value) for key, value in cache_config.items()}

    def update_core(self, stats: EngineStats) -> None:
        self.core = stats

    def front_figures(self) -> FrontFigures:
        """Those of all API processes."""
        return self.own if self.shared is None else self.own.plus(self.shared.others())

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Prometheus' collector protocol."""
        core = self.core
        for name, text in _GAUGES.items():
            yield self._filled(GaugeMetricFamily, name, text, getattr(core, name))
        yield self._labelled(
            GaugeMetricFamily, "num_requests_waiting_by_reason", "requests waiting to run", "reason",
            {"capacity": core.num_requests_waiting - core.num_requests_waiting_deferred, "deferred": core.num_requests_waiting_deferred},
        )  # fmt: skip
        for name, text in _COUNTERS.items():
            yield self._filled(CounterMetricFamily, name, text, getattr(core, name))
        cached = core.prompt_tokens_cached
        by_source = {"local_compute": core.prompt_tokens - cached, "local_cache_hit": cached, "external_kv_transfer": 0}
        yield self._labelled(CounterMetricFamily, "prompt_tokens_by_source", "prompt tokens by where their KV came from", "source", by_source)
        yield self._labelled(CounterMetricFamily, "prompt_tokens_cached_by_source", "cached prompt tokens by where they lay", "source", {"device": cached})
        for name, text in _IDLE_COUNTERS.items():
            yield self._filled(CounterMetricFamily, name, text, 0)
        yield self._labelled(GaugeMetricFamily, "engine_sleep_state", "1 for the state the engine is in", "sleep_state", _SLEEP_STATES)
        ended = dict.fromkeys(_REASONS, 0) | core.request_success
        yield self._labelled(CounterMetricFamily, "request_success", "samples that ended", "finished_reason", ended)
        yield self._labelled(CounterMetricFamily, "admission_rejections", "requests refused", "reason", core.admission_rejections)
        if self._cache_config:
            info = GaugeMetricFamily(_PREFIX + "cache_config_info", "the KV cache", labels=["engine", *self._cache_config])
            info.add_metric([_ENGINE, *self._cache_config.values()], 1.0)
            yield info
        for name, text in _HISTOGRAMS.items():
            if name in core.histograms:
                yield self._histogram(name, text, core.histograms[name])
        front = self.front_figures()
        calls = CounterMetricFamily(_PREFIX + "tool_call_parser_invocations", "answers searched for tool calls", labels=["model_name", "engine", "parser", "result"])
        for (parser, result), count in sorted(front.tool_calls.items()):
            calls.add_metric([self._model_name, _ENGINE, parser, result], float(count))
        yield calls
        yield from self._own(front)
        yield from families(front)

    def _own(self, front: FrontFigures) -> Iterator[Metric]:
        """What vLLM has no name for."""
        for name, text, value in (
            ("steps", "steps of the engine", self.core.num_steps),
            ("stalled_streams", "streams ended because nobody read them", front.stalled_streams),
        ):
            family = CounterMetricFamily(f"pagoda:{name}", text, labels=["model_name", "engine"])
            family.add_metric([self._model_name, _ENGINE], float(value))
            yield family
        load = GaugeMetricFamily("pagoda:server_load", "requests being answered now", labels=["model_name", "engine"])
        load.add_metric([self._model_name, _ENGINE], float(front.server_load))
        yield load

    def _filled(self, kind: Any, name: str, text: str, value: float) -> Metric:
        family: Metric = kind(_PREFIX + name, text, labels=["model_name", "engine"])
        family.add_metric([self._model_name, _ENGINE], float(value))  # type: ignore[attr-defined]
        return family

    def _labelled(self, kind: Any, name: str, text: str, label: str, values: dict[str, int]) -> Metric:
        family: Metric = kind(_PREFIX + name, text, labels=["model_name", "engine", label])
        for key, value in values.items():
            family.add_metric([self._model_name, _ENGINE, key], float(value))  # type: ignore[attr-defined]
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(_PREFIX + name, text, labels=["model_name", "engine"])
        buckets: list[tuple[str, float]] = []
        count = 0
        for bound, more in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
            count += more
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(count)))
        family.add_metric([self._model_name, _ENGINE], buckets=buckets, sum_value=histogram.total)
        return family


class StatsLog:
    """vLLM's line every 10 seconds, from the difference of two EngineStats. Silent (debug) while nothing happens."""

    INTERVAL = 10.0  # seconds

    def __init__(self, metrics: ServerMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics, self._clock = metrics, clock
        self._before = metrics.core
        self._time = clock()

    def line(self) -> str | None:
        """The line for the time since the last call; None when idle."""
        now, core, before = self._clock(), self._metrics.core, self._before
        seconds = max(1e-9, now - self._time)
        self._time, self._before = now, core
        prompt = core.prompt_tokens - before.prompt_tokens
        generated = core.generation_tokens - before.generation_tokens
        if not (prompt or generated or core.num_requests_running or core.num_requests_waiting):
            return None
        queries = core.prefix_cache_queries - before.prefix_cache_queries
        hits = core.prefix_cache_hits - before.prefix_cache_hits
        preempted = core.num_preemptions - before.num_preemptions
        return (
            f"Engine 000: Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
            f"Running: {core.num_requests_running} reqs, Waiting: {core.num_requests_waiting} reqs, "
            + (f"Preemptions: {preempted}, " if preempted else "")
            + f"KV cache usage: {100.0 * core.kv_cache_usage_perc:.1f}%, "
            f"Prefix cache hit rate: {100.0 * hits / queries if queries else 0.0:.1f}%"
        )

    def emit(self) -> None:
        line = self.line()
        logger.log(INFO if line else DEBUG, line or "Engine 000: idle")
