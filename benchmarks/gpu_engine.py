"""The engine on a GPU with random weights, in this process: throughput, latencies, and bandwidth against what the GPU can do.

    python benchmarks/gpu_engine.py --shape llama-3.1-8b --requests 1 --input 128 --output 256 --ceiling
    python benchmarks/gpu_engine.py --shape llama-3.1-8b --requests 256 --input 1024 --output 1024

All requests arrive at once and generate all their tokens. One JSON object: seconds, output tokens/s, TTFT and ITL (ms, medians and
99th percentiles), the mean decoding step with all requests running, its bytes (weights once, keys and values of every request)
over its time, and with --ceiling the bandwidth that a large copy and a large sum reach. `host_us` is what `forward` took of the
host for a step: starting kernels included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_shapes import SHAPES, write_shape  # noqa: E402

from pagoda.base.config import config_from_kwargs  # noqa: E402
from pagoda.base.types import GenerateRequest, SamplingParams  # noqa: E402
from pagoda.executor.launch import LocalEngine, build_engine  # noqa: E402


def ceiling() -> float:
    """Bytes a second, the better of a copy (read and written) and a sum (read) of 4 GiB."""
    import torch

    found = _bandwidth(torch)
    torch.cuda.empty_cache()
    return found


def _bandwidth(torch: Any) -> float:
    x = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)

    def best(function: Any, nbytes: int) -> float:
        times = []
        for _ in range(8):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            function()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
        return nbytes / min(times[2:])

    return max(best(lambda: y.copy_(x), 2 * x.nbytes), best(lambda: x.view(torch.int32).sum(), x.nbytes))


def run(local: LocalEngine, count: int, num_input: int, num_output: int, temperature: float) -> dict[str, Any]:
    """All requests at once; a warm-up of them first."""
    vocab, core = local.facts.vocab_size, local.core
    host: list[float] = []
    runner: Any = local.executor.runner
    forward = runner.forward

    def timed(plan: Any) -> None:
        begun = time.perf_counter()
        forward(plan)
        if len(plan.scheduled) == count and plan.num_tokens == count:
            host.append(time.perf_counter() - begun)

    def add(name: str, length: int, output: int, seed: int) -> None:
        ids = [(seed * 7919 + k * 104729) % (vocab - 10) + 5 for k in range(length)]
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=output, ignore_eos=True)
        core.add(GenerateRequest(request_id=name, prompt_token_ids=ids, params=params))

    for i in range(min(count, 8)):
        add(f"warm{i}", num_input, 8, 10_000 + i)
    while core.has_work():
        core.step()
    runner.forward = timed
    firsts: dict[str, float] = {}
    gaps: list[float] = []
    last: dict[str, float] = {}
    steps: list[float] = []
    begun = time.perf_counter()
    for i in range(count):
        add(f"r{i}", num_input, num_output, i)
    num_tokens = 0
    while core.has_work():
        started = time.perf_counter()
        outputs = core.step()
        now = time.perf_counter()
        if len(outputs) == count:
            steps.append(now - started)
        for out in outputs:
            if out.error is not None:
                raise SystemExit(f"request {out.request_id} failed: {out.error}")
            num_tokens += len(out.new_token_ids)
            if out.request_id in last:
                gaps.append(now - last[out.request_id])
            else:
                firsts[out.request_id] = now - begun
            last[out.request_id] = now
    seconds = time.perf_counter() - begun
    runner.forward = forward
    middle = steps[len(steps) // 4 : -max(1, len(steps) // 4)] or steps
    step = statistics.fmean(middle) if middle else float("nan")
    facts = local.facts
    kv_of_token = 2 * facts.num_layers * facts.num_kv_heads * facts.head_dim * (1 if local.config.cache.kv_cache_dtype == "fp8" else 2)
    nbytes = local.ledger.weights_nbytes + count * (num_input + num_output / 2) * kv_of_token
    if facts.num_parameters and not local.source.spec.tie_embeddings:
        nbytes -= facts.vocab_size * local.source.spec.hidden_size * 2  # the embedding is read by rows
    return {
        "seconds": round(seconds, 3), "output_tokens_per_s": round(num_tokens / seconds, 1), "num_tokens": num_tokens,
        "ttft_ms": _percentiles(list(firsts.values())), "itl_ms": _percentiles(gaps), "step_ms": round(step * 1e3, 4),
        "step_bytes": int(nbytes), "achieved_bytes_per_s": nbytes / step if step == step else None,
        "host_us": round(statistics.median(host) * 1e6, 1) if host else None,
        "preemptions": core.stats().num_preemptions,
    }  # fmt: skip


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": round(statistics.median(ordered) * 1e3, 3), "p99": round(ordered[int(0.99 * (len(ordered) - 1))] * 1e3, 3)} if ordered else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--ceiling", action="store_true", help="measure the GPU's bandwidth first")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="an engine argument, as kv_cache_dtype='\"fp8\"'")
    args = parser.parse_args()
    top = ceiling() if args.ceiling else None
    options: dict[str, Any] = {
        "device": "cuda", "dtype": "bfloat16", "load_format": "dummy", "max_model_len": args.input + args.output,
        "max_num_seqs": max(8, args.requests), "enable_prefix_caching": False,
    }  # fmt: skip
    options.update((name, json.loads(value)) for name, _, value in (item.partition("=") for item in args.set))
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        local = build_engine(config_from_kwargs(str(write_shape(args.shape, Path(folder))), **options))
        started = time.perf_counter() - begun
    print("\n".join(local.ledger.lines()), file=sys.stderr, flush=True)
    found = {"shape": args.shape, "requests": args.requests, "input": args.input, "output": args.output, "options": args.set,
             "start_s": round(started, 2), "temperature": args.temperature, **run(local, args.requests, args.input, args.output, args.temperature)}  # fmt: skip
    if top is not None:
        found["ceiling_bytes_per_s"] = top
        found["step_over_bytes"] = round(found["step_ms"] / 1e3 / (found["step_bytes"] / top), 4)
    local.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
