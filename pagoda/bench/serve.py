"""`pagoda bench serve`: what the clients of a server see.

    TTFT   time to first token          from sending a request to its first piece of text
    TPOT   time per output token        the rest of the answer over its tokens but the first, per request
    ITL    inter-token latency          between two pieces, over all pieces of all requests
    E2EL   end-to-end latency           from sending a request to its last piece

Without --base-url a server is started for the measurement, on this machine, whose cores it then shares with the client.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from pagoda.base import env
from pagoda.base.config import EngineConfig, changed_fields, field
from pagoda.base.errors import ConfigError, RequestFailed
from pagoda.bench.client import Client, Exchange, gather_all
from pagoda.bench.report import Report, Row, Spread
from pagoda.bench.server_process import running_server
from pagoda.bench.workload import Workload, WorkloadRequest, make_requests
from pagoda.executor.front import load_front
from pagoda.text.tokenizer import Tokenizer

__all__ = ["Options", "arrival_times", "measure", "summary"]

_GOALS = ("ttft", "tpot", "e2el")
_CLIENT_FIELDS = {"model", "served_model_name", "tokenizer", "revision", "hf_token", "download_dir", "seed", "max_model_len"}


@dataclass(frozen=True, kw_only=True)
class Options(Workload):
    """What is asked, and how fast."""

    base_url: str | None = field(None, "server to measure; without it one is started here", metavar="URL")
    backend: Literal["openai", "openai-chat"] = field("openai", "openai: token ids to /v1/completions; openai-chat: text to /v1/chat/completions")
    api_key: str | None = field(None, "key for the server (or PAGODA_API_KEY)")
    request_rate: float = field(float("inf"), "requests sent per second; inf: all at once (recorded: when they were recorded)", metavar="R")
    burstiness: float = field(1.0, "1: a Poisson process; lower comes in bursts, higher more evenly", metavar="B")
    max_concurrency: int | None = field(None, "most requests in flight at once")
    num_warmups: int = field(1, "requests sent before those that count")
    temperature: float = field(0.0, "0: always the likeliest token")
    ignore_eos: bool = field(True, "let every answer have its full length")
    goodput: tuple[str, ...] = field((), "limits in ms a good request keeps, such as ttft:500 tpot:50 e2el:3000", repeat=True, metavar="NAME:MS")
    metric_percentiles: str = field("90,99", "percentiles to report", metavar="P,P")
    save_detailed: bool = field(False, "put every request's figures in the JSON")


def measure(options: Options, config: EngineConfig) -> Report:
    """Raises ConfigError for options that cannot be measured, RequestFailed when the server cannot be used."""
    percents, goals = _percents(options.metric_percentiles), _goals(options.goodput)
    if options.base_url and (misplaced := sorted(changed_fields(config).keys() - _CLIENT_FIELDS)):
        raise ConfigError(f"`--{misplaced[0].replace('_', '-')}` is for a server started here; with --base-url the server has its own settings")
    front = load_front(config)
    limit = config.model.max_model_len
    requests = make_requests(
        options, front.tokenizer, seed=config.model.seed, max_model_len=limit if isinstance(limit, int) else 2**31
    )
    with nullcontext() if options.base_url else running_server(config) as server:
        base_url = options.base_url or (server.base_url if server else "")
        seconds, seen = asyncio.run(_drive(options, requests, front.tokenizer, base_url, config))
    rows = summary(seen, seconds, percents=percents, goals=goals)
    errors = sorted({one.error for one in seen if not one.is_ok})
    detail: dict[str, Any] = {"errors": errors}
    if options.save_detailed:
        detail["requests"] = [dataclasses.asdict(one) for one in seen]
    title = f"Serving: {len(requests)} requests, data set {options.dataset_name}, {base_url if options.base_url else 'a server of its own'}"
    notes = [f"failed: {error}" for error in errors[:3]]
    shown = dataclasses.asdict(dataclasses.replace(options, api_key=None))
    return Report(title, rows, shown, detail, notes, is_ok=not errors)


async def _drive(
    options: Options, requests: Sequence[WorkloadRequest], tokenizer: Tokenizer, base_url: str, config: EngineConfig
) -> tuple[float, list[Exchange]]:
    """-> seconds from the first request to the last answer, and the exchanges."""
    names = config.model.served_model_name
    client = Client(base_url, backend=options.backend, model=names[0] if names else None, api_key=options.api_key or env.api_key())
    try:
        if not names:
            await client.first_model()
        for request in list(requests[:1]) * options.num_warmups:
            tried = await _send(client, options, _reversed(request), tokenizer)
            if not tried.is_ok:
                raise RequestFailed(f"the server does not answer a first request: {tried.error}")
        places = asyncio.Semaphore(options.max_concurrency or len(requests))
        with tqdm(total=len(requests), desc="Requests") as bar:

            async def one(request: WorkloadRequest) -> Exchange:
                async with places:
                    found = await _send(client, options, request, tokenizer)
                bar.update()
                return found

            started = time.perf_counter()
            tasks = []
            for request, planned in zip(requests, arrival_times(len(requests), options, seed=config.model.seed), strict=True):
                at = planned if request.at is None or np.isfinite(options.request_rate) else request.at
                if (wait := started + at - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                tasks.append(asyncio.create_task(one(request)))
            seen = await gather_all(tasks)
            return time.perf_counter() - started, seen
    finally:
        await client.close()


def _reversed(request: WorkloadRequest) -> WorkloadRequest:
    """As long, and with a prefix that no counted request finds in the cache."""
    return WorkloadRequest(request.prompt_token_ids[::-1], min(16, request.output_len))


async def _send(client: Client, options: Options, request: WorkloadRequest, tokenizer: Tokenizer) -> Exchange:
    ids = request.prompt_token_ids
    prompt = ids if options.backend == "openai" else tokenizer.decode(ids)
    fields = {"temperature": options.temperature, **request.fields, "max_tokens": request.output_len, "ignore_eos": options.ignore_eos}
    return await client.send(prompt, len(ids), **fields)


def arrival_times(num: int, options: Options, *, seed: int) -> list[float]:
    """Seconds after the start at which each request is sent: gaps are gamma distributed around 1 / rate."""
    if options.request_rate <= 0 or options.burstiness <= 0:
        raise ConfigError("`--request-rate` and `--burstiness` must be above 0")
    if np.isinf(options.request_rate):
        return [0.0] * num
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(options.burstiness, 1.0 / (options.request_rate * options.burstiness), num)
    gaps[:1] = 0.0
    return [float(at) for at in np.cumsum(gaps)]


def summary(seen: Sequence[Exchange], seconds: float, *, percents: Sequence[float], goals: dict[str, float]) -> list[Row]:
    """The figures of a run, in vLLM's names. Only requests that were answered count."""
    done = [one for one in seen if one.is_ok]
    num_in, num_out = sum(one.input_len for one in done), sum(one.output_len for one in done)
    rows = [
        Row("completed", "Requests answered", len(done)),
        Row("failed", "Requests failed", len(seen) - len(done)),
        Row("duration", "Time", seconds, "s"),
        Row("total_input_tokens", "Input tokens", num_in),
        Row("total_output_tokens", "Output tokens", num_out),
        Row("request_throughput", "Requests", len(done) / seconds, "req/s"),
        Row("output_throughput", "Output tokens", num_out / seconds, "tok/s"),
        Row("total_token_throughput", "Tokens, input and output", (num_in + num_out) / seconds, "tok/s"),
    ]
    if goals:
        rows.append(Row("request_goodput", "Requests within the limits", sum(_is_good(one, goals) for one in done) / seconds, "req/s"))
    spreads = {
        "ttft": ("TTFT", [one.ttft for one in done]),
        "tpot": ("TPOT", [one.tpot for one in done if one.output_len > 1]),
        "itl": ("ITL", [gap for one in done for gap in one.itls]),
        "e2el": ("E2EL", [one.latency for one in done]),
    }
    for key, (label, values) in spreads.items():
        rows += Spread([1e3 * value for value in values]).rows(f"{key}_ms", label, "ms", percents)
    return rows


def _is_good(one: Exchange, goals: dict[str, float]) -> bool:
    found = {"ttft": one.ttft, "tpot": one.tpot, "e2el": one.latency}
    return all(1e3 * found[name] <= limit for name, limit in goals.items())


def _goals(texts: Sequence[str]) -> dict[str, float]:
    goals = {}
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            goals[name] = float(limit)
        except ValueError:
            raise ConfigError(f"`--goodput {text}` must be a name and milliseconds, such as ttft:500") from None
        if name not in _GOALS:
            raise ConfigError(f"`--goodput {text}`: unknown figure; known: {', '.join(_GOALS)}")
    return goals


def _percents(text: str) -> list[float]:
    try:
        percents = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"`--metric-percentiles {text}` must be numbers with commas, such as 90,99") from None
    if not all(0 <= percent <= 100 for percent in percents):
        raise ConfigError(f"`--metric-percentiles {text}` must be between 0 and 100")
    return percents
