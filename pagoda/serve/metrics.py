"""Prometheus figures under vLLM's names, so that its dashboards work unchanged.

Counters and gauges of the core come with its outputs (`update_core`); times and sizes of requests are seen here, where
the client would see them. Observing costs a bisection and three additions: it happens once per streamed token.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from logging import DEBUG, INFO
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from pagoda.base.log import get_logger
from pagoda.base.types import RequestOutput, SamplingParams

__all__ = ["Histogram", "RequestWatch", "ServerMetrics", "StatsLog"]

logger = get_logger("serve")

_PREFIX = "vllm:"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_LATENCY = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
_SAMPLES = (1, 2, 5, 10, 20)

_LATENCIES = {
    "time_to_first_token_seconds": ("from the request's arrival to its first token", _TTFT),
    "inter_token_latency_seconds": ("between two tokens of one sample", _ITL),
    "request_time_per_output_token_seconds": ("mean time per token after the first", _ITL),
    "e2e_request_latency_seconds": ("from arrival to the last token", _LATENCY),
    "request_queue_time_seconds": ("waiting before the first step", _LATENCY),
    "request_inference_time_seconds": ("running: prefill and decode", _LATENCY),
    "request_prefill_time_seconds": ("from the first step to the first token", _LATENCY),
    "request_decode_time_seconds": ("from the first token to the last", _LATENCY),
}
_SIZES = {
    "request_prompt_tokens": "prompt tokens of a request",
    "request_generation_tokens": "generated tokens of a request",
    "request_max_num_generation_tokens": "longest sample of a request",
    "request_params_max_tokens": "max_tokens asked for",
    "request_prefill_kv_computed_tokens": "prompt tokens computed, cached ones left out",
}
_CORE_GAUGES = {
    "num_requests_running": ("num_requests_running", "requests in the current batch"),
    "num_requests_waiting": ("num_requests_waiting", "requests waiting to run"),
    "kv_cache_usage_perc": ("kv_cache_usage", "share of KV blocks in use, 1 is full"),
}
_CORE_COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries", "tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "tokens found in the prefix cache"),
    "num_preemptions": ("num_preemptions", "requests that lost their KV blocks and will be recomputed"),
    "prompt_tokens": ("prompt_tokens", "prompt tokens computed or found"),
    "prompt_tokens_cached": ("prefix_cache_hits", "prompt tokens found in the prefix cache"),
    "generation_tokens": ("generation_tokens", "tokens generated"),
}


class Histogram:
    """Counts per bucket; `bounds` are upper, inclusive."""

    __slots__ = ("_counts", "_sum", "bounds")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self.bounds, value)] += times
        self._sum += value * times

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' cumulative buckets (`le`, count) and the sum of all values."""
        total = 0.0
        rows = []
        for bound, count in zip((*self.bounds, float("inf")), self._counts, strict=True):
            total += count
            rows.append(("+Inf" if bound == float("inf") else repr(float(bound)), total))
        return rows, self._sum


class ServerMetrics:
    """All figures of one server. One event loop writes and reads: no locks."""

    def __init__(self) -> None:
        self.server_load = 0  # requests being answered now
        self.core: Any = None  # the last EngineStats
        self._model_name, self._engine = "", "0"
        self._cache_config: dict[str, str] = {}
        self._histograms: dict[str, tuple[Histogram, str]] = {}
        self._finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self.set_model("", 1 << 17)

    def set_model(self, name: str, max_model_len: int) -> None:
        """Label values and the size buckets, once the model is known."""
        self._model_name = name
        sizes = _one_two_five(max_model_len)
        rows: dict[str, tuple[Histogram, str]] = {key: (Histogram(bounds), text) for key, (text, bounds) in _LATENCIES.items()}
        rows |= {key: (Histogram(sizes), text) for key, text in _SIZES.items()}
        rows["request_params_n"] = (Histogram(_SAMPLES), "samples asked for")
        self._histograms = rows

    def set_cache_config(self, **facts: object) -> None:
        """Labels of `cache_config_info` (block_size, num_gpu_blocks, ...)."""
        self._cache_config = {key: str(value) for key, value in facts.items()}

    def observe(self, name: str, value: float, times: int = 1) -> None:
        self._histograms[name][0].observe(value, times)

    def update_core(self, stats: Any) -> None:
        """Take over an EngineStats (cumulative counters, gauges of now)."""
        self.core = stats

    def count_finished(self, reason: str) -> None:
        self._finished[reason] = self._finished.get(reason, 0) + 1

    def watch_request(self, params: SamplingParams, arrival: float) -> RequestWatch:
        """A recorder of one prompt's life; `arrival` in seconds of the monotonic clock."""
        return RequestWatch(self, params, arrival)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Prometheus' collector protocol."""
        labels = {"model_name": self._model_name, "engine": self._engine}
        keys, values = list(labels), list(labels.values())
        for name, (attribute, text) in _CORE_GAUGES.items():
            gauge = GaugeMetricFamily(_PREFIX + name, text, labels=keys)
            gauge.add_metric(values, float(getattr(self.core, attribute, 0) if self.core else 0))
            yield gauge
        for name, (attribute, text) in _CORE_COUNTERS.items():
            counter = CounterMetricFamily(_PREFIX + name, text, labels=keys)
            counter.add_metric(values, float(getattr(self.core, attribute, 0) if self.core else 0))
            yield counter
        success = CounterMetricFamily(_PREFIX + "request_success", "finished samples", labels=[*keys, "finished_reason"])
        for reason, count in self._finished.items():
            success.add_metric([*values, reason], float(count))
        yield success
        if self._cache_config:
            info = GaugeMetricFamily(_PREFIX + "cache_config_info", "the KV cache", labels=["engine", *self._cache_config])
            info.add_metric([self._engine, *self._cache_config.values()], 1.0)
            yield info
        for name, (histogram, text) in self._histograms.items():
            family = HistogramMetricFamily(_PREFIX + name, text, labels=keys)
            buckets, total = histogram.buckets()
            family.add_metric(values, buckets=buckets, sum_value=total)
            yield family


def _one_two_five(top: int) -> tuple[float, ...]:
    """1, 2, 5, 10, ... up to `top`."""
    bounds = [float(digit * 10**power) for power in range(9) for digit in (1, 2, 5)]
    return tuple(bound for bound in bounds if bound <= top) or (1.0,)


class RequestWatch:
    """What a prompt's outputs tell about time. A stream is timed as it passes; a whole answer by the core's own clock."""

    __slots__ = ("_arrival", "_first", "_is_done", "_last", "_metrics", "_num_cached", "_num_prompt", "_num_tokens", "_params")

    def __init__(self, metrics: ServerMetrics, params: SamplingParams, arrival: float) -> None:
        self._metrics, self._params, self._arrival = metrics, params, arrival
        self._first = 0.0
        self._last: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._num_prompt = self._num_cached = 0
        self._is_done = False

    def saw(self, output: RequestOutput) -> None:
        now = time.monotonic()
        for sample in output.outputs:
            if num := len(sample.token_ids):
                self._saw_tokens(sample.index, num, now)
            if sample.finish_reason is not None:
                self._metrics.count_finished(sample.finish_reason)
        self._num_prompt, self._num_cached = len(output.prompt_token_ids), output.num_cached_tokens
        if output.finished:
            self._finish(output, now)

    def _saw_tokens(self, index: int, num: int, now: float) -> None:
        self._num_tokens[index] = self._num_tokens.get(index, 0) + num
        if not self._first:
            self._first = now
        last = self._last.get(index)
        if last is not None:
            self._metrics.observe("inter_token_latency_seconds", (now - last) / num, num)
        self._last[index] = now

    def _finish(self, output: RequestOutput, now: float) -> None:
        self._is_done = True
        observe = self._metrics.observe
        times = output.metrics
        longest = max(self._num_tokens.values(), default=0)
        first = self._first
        if times is not None and times.first_token_time and longest and len(self._last) and first == now:
            first = self._arrival + (times.first_token_time - times.arrival_time if times.arrival_time else 0.0)
        observe("e2e_request_latency_seconds", now - self._arrival)
        if first:
            observe("time_to_first_token_seconds", max(0.0, first - self._arrival))
        if longest > 1:
            mean = max(0.0, now - first) / (longest - 1)
            observe("request_time_per_output_token_seconds", mean)
            if self._first == now:
                observe("inter_token_latency_seconds", mean, longest - 1)
        if times is not None and times.scheduled_time and times.first_token_time:
            observe("request_queue_time_seconds", max(0.0, times.scheduled_time - (times.queued_time or times.arrival_time)))
            observe("request_prefill_time_seconds", times.first_token_time - times.scheduled_time)
            observe("request_decode_time_seconds", times.last_token_time - times.first_token_time)
            observe("request_inference_time_seconds", times.last_token_time - times.scheduled_time)
        observe("request_prompt_tokens", self._num_prompt)
        observe("request_prefill_kv_computed_tokens", max(0, self._num_prompt - self._num_cached))
        observe("request_generation_tokens", sum(self._num_tokens.values()))
        observe("request_max_num_generation_tokens", longest)
        observe("request_params_n", self._params.n)
        if self._params.max_tokens is not None:
            observe("request_params_max_tokens", self._params.max_tokens)

    def ended(self) -> None:
        """The handler is done with this prompt, however it ended."""
        if not self._is_done:
            self._is_done = True
            self._metrics.count_finished("abort")


class StatsLog:
    """vLLM's line every 10 seconds, from the difference of two EngineStats. Silent (debug) while nothing happens."""

    INTERVAL = 10.0  # seconds

    def __init__(self, metrics: ServerMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics, self._clock = metrics, clock
        self._before = self._figures()
        self._time = clock()

    def _figures(self) -> tuple[float, float, float, float]:
        core = self._metrics.core
        if core is None:
            return 0.0, 0.0, 0.0, 0.0
        return core.prompt_tokens, core.generation_tokens, core.prefix_cache_queries, core.prefix_cache_hits

    def line(self) -> str | None:
        """The line for the time since the last call; None when idle."""
        now, figures = self._clock(), self._figures()
        seconds = max(1e-9, now - self._time)
        prompt, generated, queries, hits = (b - a for a, b in zip(self._before, figures, strict=True))
        self._time, self._before = now, figures
        core = self._metrics.core
        if core is None or not (prompt or generated or core.num_requests_running or core.num_requests_waiting):
            return None
        rate = 100.0 * hits / queries if queries else 0.0
        return (
            f"Engine 000: Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
            f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
            f"Running: {core.num_requests_running} reqs, Waiting: {core.num_requests_waiting} reqs, "
            f"KV cache usage: {100.0 * core.kv_cache_usage:.1f}%, Prefix cache hit rate: {rate:.1f}%"
        )

    def emit(self) -> None:
        line = self.line()
        logger.log(INFO if line else DEBUG, line or "Engine 000: idle")
