"""`pagoda bench engine`: tokens in, tokens out, in this process: throughput, latencies, and the bandwidth of a step beside the memory's.

All requests arrive at once and generate all their tokens. A step in which every one of them decodes reads the weights once and the keys
and values of each request: those bytes over the mean time of such a step is the bandwidth achieved. What memory can give is measured on
a GPU before the engine is built (the better of copying and adding up 4 GiB), or given (`--ceiling-gb-s`). No text is made, so
random weights of a known shape (--shape) need no tokenizer.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from pagoda.base.config import EngineConfig, field
from pagoda.base.errors import ConfigError, RequestFailed
from pagoda.base.registry import nearest
from pagoda.base.types import GenerateRequest, SamplingParams
from pagoda.bench.report import Report, Row, Spread
from pagoda.bench.shapes import SHAPES, write_shape
from pagoda.executor.launch import LocalEngine, build_engine, describe_model

__all__ = ["Figures", "Options", "figures", "measure", "step_nbytes"]

_KV_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    shape: str | None = field(None, f"random weights of a known shape instead of a model: {', '.join(SHAPES)}")
    requests: int = field(1, "requests that run at once")
    input_len: int = field(128, "tokens of a prompt")
    output_len: int = field(256, "tokens of an answer")
    temperature: float = field(1.0, "0: always the likeliest token")
    ceiling_gb_s: float | None = field(None, "what memory gives, in GB/s (default: measured on a GPU)", metavar="GB/S")


class Figures(NamedTuple):
    """Seconds, and bytes. `host` is what starting a decoding step takes of the host; steps are those in which all requests decode."""

    start: float
    seconds: float
    num_tokens: int
    first: Sequence[float]
    gaps: Sequence[float]
    step: float
    step_nbytes: int
    host: float
    ceiling: float  # bytes a second; 0: not known
    num_preemptions: int

    @property
    def achieved(self) -> float:
        """Bytes a second of a step; 0 without one."""
        return self.step_nbytes / self.step if self.step else 0.0


def measure(options: Options, config: EngineConfig) -> Report:
    """Raises ConfigError for options that cannot be measured, and what loading the model raises."""
    found, lines = figures(options, config)
    rows = [
        Row("elapsed_time", "Time", found.seconds, "s"),
        Row("total_output_tokens", "Output tokens", found.num_tokens),
        Row("output_tokens_per_second", "Output tokens", found.num_tokens / found.seconds, "tok/s"),
        *Spread([1e3 * x for x in found.first]).rows("ttft_ms", "Time to first token", "ms", (99,)),
        *Spread([1e3 * x for x in found.gaps]).rows("itl_ms", "Time between tokens", "ms", (99,)),
        Row("step_ms", "Step of all requests, mean", 1e3 * found.step, "ms"),
        Row("host_ms", "  of which the host starts it in", 1e3 * found.host, "ms"),
        Row("achieved_gb_s", "Bandwidth of a step", found.achieved / 1e9, "GB/s"),
    ]
    if found.ceiling:
        rows.append(Row("ceiling_gb_s", "Bandwidth of the memory", found.ceiling / 1e9, "GB/s"))
        rows.append(Row("bandwidth_share", "Share of it", found.achieved / found.ceiling))
    rows += [Row("num_preemptions", "Preemptions", found.num_preemptions), Row("start_s", "Start", found.start, "s")]
    title = f"Engine: {options.requests} requests of {options.input_len} + {options.output_len} tokens, {options.shape or config.model.model or 'the default model'}"
    return Report(title, rows, dataclasses.asdict(options), notes=lines)


def figures(options: Options, config: EngineConfig) -> tuple[Figures, list[str]]:
    """What was measured, and the engine's report of its start."""
    if min(options.requests, options.input_len, options.output_len) < 1:
        raise ConfigError("`--requests`, `--input-len` and `--output-len` must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        config = _prepared(options, config, Path(folder))
        ceiling = (options.ceiling_gb_s or 0) * 1e9 or _ceiling(config)
        begun = time.perf_counter()
        local = build_engine(config)
        start = time.perf_counter() - begun
    try:
        longest = local.config.model.max_model_len
        if options.input_len + options.output_len > int(longest or 0):
            raise ConfigError(f"{options.input_len} + {options.output_len} tokens are more than the context of {longest}; lower --input-len or --output-len")
        run = _Run(local, options)
        run.all()
        found = Figures(
            start, run.seconds, run.num_tokens, list(run.first.values()), run.gaps, run.step, step_nbytes(local, options),
            statistics.median(run.host) if run.host else 0.0, ceiling, local.core.stats().num_preemptions,
        )  # fmt: skip
        return found, local.ledger.lines()
    finally:
        local.close()


def _prepared(options: Options, config: EngineConfig, folder: Path) -> EngineConfig:
    """A shape's folder in the place of the model; room for the requests; other prompts are no prefixes."""
    model = config.model
    if options.shape is not None:
        if options.shape not in SHAPES:
            raise ConfigError(f"`--shape {options.shape}` is not one of {', '.join(SHAPES)}{nearest(options.shape, list(SHAPES))}")
        if model.model is not None:
            raise ConfigError(f"`--shape {options.shape}` stands for a model, and `{model.model}` is given too")
        model = replace(model, model=str(write_shape(options.shape, folder)), load_format="dummy")
        if model.max_model_len is None:
            model = replace(model, max_model_len=options.input_len + options.output_len)
    scheduler = config.scheduler
    if scheduler.max_num_seqs is None:
        scheduler = replace(scheduler, max_num_seqs=max(8, options.requests))
    return replace(config, model=model, scheduler=scheduler, cache=replace(config.cache, enable_prefix_caching=False))


def _ceiling(config: EngineConfig) -> float:
    """Of a GPU, before the engine takes its memory; 0 where there is none."""
    if describe_model(config)[1].device.device != "cuda":
        return 0.0
    from pagoda.worker.device import memory_bandwidth

    return memory_bandwidth()


def step_nbytes(local: LocalEngine, options: Options) -> int:
    """Bytes a step of all requests reads, in the middle of their answers: weights once, keys and values of every request."""
    facts, spec = local.facts, local.source.spec
    nbytes = float(local.ledger.weights_nbytes)
    if not spec.tie_embeddings:
        nbytes -= facts.vocab_size * spec.hidden_size * _KV_BYTES[local.config.model.dtype]  # the embedding is read by rows
    context = options.input_len + options.output_len / 2
    one = 2 * facts.num_kv_heads * facts.head_dim * _KV_BYTES[local.config.cache.kv_cache_dtype]
    seen = sum(len(group.layers) * min(context, group.window or context) for group in facts.kv_groups)
    return int(nbytes + options.requests * seen * one)


class _Run:
    """One run behind a small one that warms up."""

    def __init__(self, local: LocalEngine, options: Options) -> None:
        self._local, self._options, self._core = local, options, local.core
        self.seconds, self.num_tokens, self.step = 0.0, 0, 0.0
        self.first: dict[str, float] = {}
        self.gaps: list[float] = []
        self.host: list[float] = []

    def all(self) -> None:
        options, core = self._options, self._core
        for i in range(min(options.requests, 8)):
            self._add(f"warm{i}", min(8, options.output_len), 10_000 + i)
        while core.has_work():
            core.step()
        runner: Any = self._local.executor.runner
        forward = runner.forward

        def timed(plan: Any) -> None:
            begun = time.perf_counter()
            forward(plan)
            if len(plan.scheduled) == options.requests == plan.num_tokens:
                self.host.append(time.perf_counter() - begun)

        runner.forward = timed
        try:
            self._measured()
        finally:
            runner.forward = forward

    def _measured(self) -> None:
        core, last, steps = self._core, dict[str, float](), list[float]()
        begun = time.perf_counter()
        for i in range(self._options.requests):
            self._add(f"r{i}", self._options.output_len, i)
        while core.has_work():
            started = time.perf_counter()
            outputs = core.step()
            now = time.perf_counter()
            if len(outputs) == self._options.requests:
                steps.append(now - started)
            for out in outputs:
                if out.error is not None:
                    raise RequestFailed(f"request {out.request_id} failed: {out.error}")
                self.num_tokens += len(out.new_token_ids)
                if out.request_id in last:
                    self.gaps.append(now - last[out.request_id])
                else:
                    self.first[out.request_id] = now - begun
                last[out.request_id] = now
        self.seconds = time.perf_counter() - begun
        middle = steps[len(steps) // 4 : -max(1, len(steps) // 4)] or steps
        self.step = statistics.fmean(middle) if middle else 0.0

    def _add(self, name: str, num_output: int, seed: int) -> None:
        vocab = self._local.facts.vocab_size
        ids = [(seed * 7919 + k * 104729) % (vocab - 10) + 5 for k in range(self._options.input_len)]
        params = SamplingParams(temperature=self._options.temperature, seed=seed, max_tokens=num_output, ignore_eos=True)
        self._core.add(GenerateRequest(request_id=name, prompt_token_ids=ids, params=params))
