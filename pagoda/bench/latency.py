"""`pagoda bench latency`: how long one batch of equal requests takes, from handing it in to its last token.

Every iteration has other random prompts, so that no prefix is found in the cache.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pagoda.api.llm import LLM
from pagoda.base.config import EngineConfig, field
from pagoda.base.errors import ConfigError
from pagoda.base.types import RequestOutput, SamplingParams
from pagoda.bench.report import Report, Row, Spread
from pagoda.executor.launch import build_engine

__all__ = ["Options", "measure"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    input_len: int = field(32, "tokens of a prompt")
    output_len: int = field(128, "tokens of an answer")
    batch_size: int = field(8, "requests handed in together")
    n: int = field(1, "answers per request")
    num_iters_warmup: int = field(1, "iterations that do not count")
    num_iters: int = field(5, "iterations that count")


class _Iteration(NamedTuple):
    seconds: float
    ttft: float  # until every request has its first token, seconds
    decode_rate: float  # tokens after the first ones, a second; 0 with one token


def measure(options: Options, config: EngineConfig) -> Report:
    """Raises ConfigError for options that cannot be measured, and what loading the model raises."""
    if min(options.input_len, options.output_len, options.batch_size, options.n, options.num_iters) < 1:
        raise ConfigError("`--input-len`, `--output-len`, `--batch-size`, `--n` and `--num-iters` must be at least 1")
    engine = build_engine(config)
    llm = LLM(engine=engine)
    rng = np.random.default_rng(config.model.seed)
    vocab_size = llm.get_tokenizer().vocab_size
    done = []
    try:
        for i in tqdm(range(options.num_iters_warmup + options.num_iters), desc="Iterations"):
            prompts = rng.integers(0, vocab_size, (options.batch_size, options.input_len)).tolist()
            found = _iterate(llm, prompts, options)
            if i >= options.num_iters_warmup:
                done.append(found)
    finally:
        llm.close()
    title = f"Latency: {options.batch_size} requests of {options.input_len} + {options.output_len} tokens, {options.num_iters} iterations"
    return Report(title, _rows(done), dataclasses.asdict(options), {"latencies": [one.seconds for one in done]})


def _iterate(llm: LLM, prompts: Sequence[list[int]], options: Options) -> _Iteration:
    params = SamplingParams(
        n=options.n, temperature=1.0, seed=0, max_tokens=options.output_len, ignore_eos=True, detokenize=False
    )
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    first, last = _span(outputs)
    num_decoded = sum(len(sample.token_ids) - 1 for output in outputs for sample in output.outputs)
    arrival = min(output.metrics.arrival_time for output in outputs if output.metrics)
    return _Iteration(seconds, first - arrival, num_decoded / (last - first) if last > first else 0.0)


def _span(outputs: Sequence[RequestOutput]) -> tuple[float, float]:
    """When the last first token came, and the last token of all: between them all requests only decode."""
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    assert len(metrics) == len(outputs), "a request has ended without its times"
    return max(m.first_token_time for m in metrics), max(m.last_token_time for m in metrics)


def _rows(done: Sequence[_Iteration]) -> list[Row]:
    latency = Spread([one.seconds for one in done])
    rows = [Row("avg_latency", "Latency, mean", latency.mean, "s")]
    rows += [Row(f"p{percent}_latency", f"Latency, p{percent}", latency.at(percent), "s") for percent in (10, 50, 90, 99)]
    rows.append(Row("median_ttft_ms", "Time to the last first token, median", 1e3 * Spread([one.ttft for one in done]).at(50), "ms"))
    rows.append(Row("decode_tokens_per_second", "Decode, median", Spread([one.decode_rate for one in done]).at(50), "tok/s"))
    return rows
