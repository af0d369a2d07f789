"""`pagoda bench engine` on a GPU for `make gpu-check`: one JSON object a run, and no package that a bare machine may lack.

    python benchmarks/gpu_engine.py --shape llama-3.1-8b --requests 1 --input 128 --output 256 --ceiling
    python benchmarks/gpu_engine.py --shape llama-3.1-8b --requests 256 --input 1024 --output 1024

Seconds, output tokens/s, TTFT and ITL (ms, medians and 99th percentiles), the mean decoding step with all requests running, its bytes
over its time, and with --ceiling the bandwidth that a large copy and a large sum reach. `host_us` is what `forward` took of the
host for a step: starting kernels included.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from pagoda.base.config import config_from_kwargs  # noqa: E402
from pagoda.bench.engine import Options, figures  # noqa: E402
from pagoda.bench.report import Spread  # noqa: E402
from pagoda.bench.shapes import SHAPES  # noqa: E402


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
    set_options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    set_options.update((name, json.loads(value)) for name, _, value in (item.partition("=") for item in args.set))
    options = Options(
        shape=args.shape, requests=args.requests, input_len=args.input, output_len=args.output, temperature=args.temperature,
        ceiling_gb_s=None if args.ceiling else 1.0,
    )  # fmt: skip
    found, lines = figures(options, config_from_kwargs(None, **set_options))
    print("\n".join(lines), file=sys.stderr, flush=True)
    first, gaps = Spread([1e3 * x for x in found.first]), Spread([1e3 * x for x in found.gaps])
    result: dict[str, Any] = {
        "shape": args.shape, "requests": args.requests, "input": args.input, "output": args.output, "options": args.set, "temperature": args.temperature,
        "start_s": round(found.start, 2), "seconds": round(found.seconds, 3), "num_tokens": found.num_tokens,
        "output_tokens_per_s": round(found.num_tokens / found.seconds, 1),
        "ttft_ms": {"p50": round(first.at(50), 3), "p99": round(first.at(99), 3)}, "itl_ms": {"p50": round(gaps.at(50), 3), "p99": round(gaps.at(99), 3)},
        "step_ms": round(1e3 * found.step, 4), "step_bytes": found.step_nbytes, "achieved_bytes_per_s": found.achieved,
        "host_us": round(1e6 * found.host, 1), "preemptions": found.num_preemptions,
    }  # fmt: skip
    if args.ceiling and found.ceiling and found.step:
        result["ceiling_bytes_per_s"] = found.ceiling
        result["step_over_bytes"] = round(found.ceiling / found.achieved, 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
