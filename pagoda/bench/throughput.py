"""`pagoda bench throughput`: all requests handed in at once, offline; how many requests and tokens a second come out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pagoda.api.llm import LLM
from pagoda.base.config import EngineConfig, field
from pagoda.base.errors import RequestFailed
from pagoda.base.types import RequestOutput, SamplingParams
from pagoda.bench.report import Report, Row
from pagoda.bench.workload import Workload, WorkloadRequest, make_requests
from pagoda.executor.launch import build_engine

__all__ = ["Options", "measure"]


@dataclass(frozen=True, kw_only=True)
class Options(Workload):
    """What is asked."""

    n: int = field(1, "answers per prompt")
    temperature: float = field(1.0, "0: always the likeliest token")
    disable_detokenize: bool = field(False, "leave the answers as token ids")


def measure(options: Options, config: EngineConfig) -> Report:
    """Raises ConfigError for options that cannot be measured, and what loading the model raises."""
    engine = build_engine(config)
    llm = LLM(engine=engine)
    try:
        max_model_len = engine.config.model.max_model_len
        assert isinstance(max_model_len, int)
        requests = make_requests(options, llm.get_tokenizer(), seed=config.model.seed, max_model_len=max_model_len)
        _warm_up(llm)
        started = time.perf_counter()
        outputs = llm.generate([request.prompt_token_ids for request in requests], [_params(request, options) for request in requests])
        seconds = time.perf_counter() - started
        stats = engine.core.stats()
    finally:
        llm.close()
    rows = [*_rows(outputs, seconds), Row("num_preemptions", "Preemptions", stats.num_preemptions)]
    title = f"Throughput: {len(requests)} requests, data set {options.dataset_name}"
    return Report(title, rows, dataclasses.asdict(options))


def _params(request: WorkloadRequest, options: Options) -> SamplingParams:
    return SamplingParams(
        n=options.n, temperature=options.temperature, max_tokens=request.output_len, ignore_eos=True, detokenize=not options.disable_detokenize
    )


def _warm_up(llm: LLM) -> None:
    """Pages touched and threads started, on a prompt that no request shares."""
    llm.generate([[0, 0, 0, 0]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)


def _rows(outputs: Sequence[RequestOutput], seconds: float) -> list[Row]:
    failed = [output for output in outputs if any(sample.finish_reason == "error" for sample in output.outputs)]
    if failed:
        raise RequestFailed(f"{len(failed)} of {len(outputs)} requests failed; the log says why")
    num_in = sum(len(output.prompt_token_ids) for output in outputs)
    num_out = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    return [
        Row("num_requests", "Requests", len(outputs)),
        Row("elapsed_time", "Time", seconds, "s"),
        Row("total_input_tokens", "Input tokens", num_in),
        Row("total_output_tokens", "Output tokens", num_out),
        Row("requests_per_second", "Requests", len(outputs) / seconds, "req/s"),
        Row("tokens_per_second", "Tokens, input and output", (num_in + num_out) / seconds, "tok/s"),
        Row("output_tokens_per_second", "Output tokens", num_out / seconds, "tok/s"),
        Row("num_cached_tokens", "Input tokens from the prefix cache", sum(output.num_cached_tokens for output in outputs)),
    ]
