"""What the core counts about itself. Aggregated here, where it happens, so that a scrape is one small message.

Names are those of vLLM's metrics without the prefix; the server renders them. Times are seconds.
"""

from __future__ import annotations

import copy
from bisect import bisect_left

import msgspec

from pagoda.base.types import FinishReason
from pagoda.engine.request import Request

__all__ = ["EngineStats", "Histogram", "StatsRecorder"]

_LATENCY = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
_FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560]
_BETWEEN_TOKENS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80]
_STEP_TOKENS = [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
_SMALL = [0, 1, 2, 5, 10, 20, 50, 100]


class Histogram(msgspec.Struct):
    """Prometheus buckets, not cumulative: counts[i] values were in (bounds[i-1], bounds[i]]; the last is the overflow."""

    bounds: list[float]
    counts: list[int]
    total: float = 0.0  # sum of all values

    @classmethod
    def of(cls, bounds: list[float]) -> Histogram:
        return cls(list(bounds), [0] * (len(bounds) + 1))

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class EngineStats(msgspec.Struct, kw_only=True):
    """Gauges as of now; counters and histograms since the start."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    num_requests_waiting_deferred: int = 0  # of those, waiting for another request's prefix
    kv_cache_usage_perc: float = 0.0  # 0 to 1
    num_kv_blocks: int = 0  # usable ones
    num_steps: int = 0
    prefix_cache_queries: int = 0  # tokens looked up
    prefix_cache_hits: int = 0  # tokens found
    num_preemptions: int = 0
    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    corrupted_requests: int = 0  # samples whose logits were not finite
    request_success: dict[str, int] = {}  # samples by finish reason
    admission_rejections: dict[str, int] = {}  # by error class
    histograms: dict[str, Histogram] = {}


def _up_to(max_model_len: int) -> list[float]:
    """1, 2, 5, 10, ... below the longest request."""
    bounds: list[float] = []
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale > max_model_len:
                return bounds
            bounds.append(float(digit * scale))
        scale *= 10


class StatsRecorder:
    """Called by the core at each event; `stats` is live, `snapshot` is a copy."""

    def __init__(self, max_model_len: int, num_kv_blocks: int) -> None:
        tokens = _up_to(max_model_len)
        bounds: dict[str, list[float]] = {
            "time_to_first_token_seconds": _FIRST_TOKEN,
            "inter_token_latency_seconds": _BETWEEN_TOKENS,
            "request_time_per_output_token_seconds": _BETWEEN_TOKENS,
            "e2e_request_latency_seconds": _LATENCY,
            "request_queue_time_seconds": _LATENCY,
            "request_inference_time_seconds": _LATENCY,
            "request_prefill_time_seconds": _LATENCY,
            "request_decode_time_seconds": _LATENCY,
            "request_prompt_tokens": tokens,
            "request_generation_tokens": tokens,
            "request_max_num_generation_tokens": tokens,
            "request_prefill_kv_computed_tokens": tokens,
            "request_params_max_tokens": tokens,
            "request_params_n": [float(n) for n in (1, 2, 5, 10, 20)],
            "request_num_preemptions": [float(n) for n in _SMALL],
            "iteration_tokens_total": [float(n) for n in _STEP_TOKENS],
        }
        histograms = {name: Histogram.of([float(bound) for bound in row]) for name, row in bounds.items()}
        self.stats = EngineStats(num_kv_blocks=num_kv_blocks, histograms=histograms)
        self._between_tokens: dict[float, int] = {}  # the same few intervals come up for every row of a step

    def on_arrival(self, n: int, max_tokens: int | None) -> None:
        self._observe("request_params_n", n)
        if max_tokens is not None:
            self._observe("request_params_max_tokens", max_tokens)

    def on_rejection(self, name: str) -> None:
        rejections = self.stats.admission_rejections
        rejections[name] = rejections.get(name, 0) + 1

    def on_admitted(self, req: Request, now: float, *, looked_up: bool) -> None:
        """`req` runs for the first time."""
        req.metrics.scheduled_time = now
        if looked_up:
            self.stats.prefix_cache_queries += req.num_prompt_tokens
            self.stats.prefix_cache_hits += req.num_tokens_cached

    def on_tokens(self, req: Request, count: int, now: float) -> None:
        """`req` has been given `count` new tokens, already appended."""
        metrics = req.metrics
        self.stats.generation_tokens += count
        if metrics.first_token_time == 0.0:
            metrics.first_token_time = now
            self.stats.prompt_tokens += req.num_prompt_tokens
            self.stats.prompt_tokens_cached += req.num_tokens_cached
            self._observe("time_to_first_token_seconds", now - metrics.arrival_time)
        else:
            elapsed = now - metrics.last_token_time
            self._between_tokens[elapsed] = self._between_tokens.get(elapsed, 0) + 1
        metrics.last_token_time = now

    def on_step(self, num_tokens: int) -> None:
        self.stats.num_steps += 1
        self._observe("iteration_tokens_total", num_tokens)
        if self._between_tokens:
            histogram = self.stats.histograms["inter_token_latency_seconds"]
            for elapsed, times in self._between_tokens.items():
                histogram.observe(elapsed, times)
            self._between_tokens.clear()

    def on_finished(self, req: Request, reason: FinishReason, now: float) -> None:
        success = self.stats.request_success
        success[reason.value] = success.get(reason.value, 0) + 1
        metrics = req.metrics
        self._observe("e2e_request_latency_seconds", now - metrics.arrival_time)
        self._observe("request_prompt_tokens", req.num_prompt_tokens)
        self._observe("request_generation_tokens", req.num_output_tokens)
        self._observe("request_num_preemptions", metrics.num_preemptions)
        if metrics.first_token_time == 0.0:
            return
        self._observe("request_queue_time_seconds", metrics.scheduled_time - metrics.queued_time)
        self._observe("request_inference_time_seconds", metrics.last_token_time - metrics.scheduled_time)
        self._observe("request_prefill_time_seconds", metrics.first_token_time - metrics.scheduled_time)
        decode = metrics.last_token_time - metrics.first_token_time
        self._observe("request_decode_time_seconds", decode)
        self._observe("request_prefill_kv_computed_tokens", req.num_prompt_tokens - req.num_tokens_cached)
        if req.num_output_tokens > 1:
            self._observe("request_time_per_output_token_seconds", decode / (req.num_output_tokens - 1))

    def on_family_finished(self, max_num_generation_tokens: int) -> None:
        """All n samples of a request are over."""
        self._observe("request_max_num_generation_tokens", max_num_generation_tokens)

    def _observe(self, name: str, value: float) -> None:
        self.stats.histograms[name].observe(value)

    def snapshot(self) -> EngineStats:
        return copy.deepcopy(self.stats)
