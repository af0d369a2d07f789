"""A step on a time line: `python benchmarks/trace.py --streams 16 --out trace.json`, then open it in chrome://tracing or Perfetto.

Rows: the engine (plan, forward, sample, settle) and, below it, every stage of the recorded program by op.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pagoda.base.config import config_from_kwargs
from pagoda.base.types import GenerateRequest, SamplingParams
from pagoda.executor.launch import build_engine
from pagoda.worker.graphs import Recorded

ENGINE, PROGRAM = 1, 2


class Trace:
    """Events of Chrome's trace format; times in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def add(self, name: str, row: int, start: float, seconds: float) -> None:
        self.events.append({"name": name, "ph": "X", "pid": 1, "tid": row, "ts": start * 1e6, "dur": seconds * 1e6})

    def around(self, owner: Any, method: str, name: str) -> None:
        """Replaces a bound method by one that notes when it ran."""
        call: Callable[..., Any] = getattr(owner, method)

        def noted(*args: Any, **kwargs: Any) -> Any:
            begun = time.monotonic()
            try:
                return call(*args, **kwargs)
            finally:
                self.add(name, ENGINE, begun, time.monotonic() - begun)

        setattr(owner, method, noted)

    def write(self, path: Path) -> None:
        names = [(ENGINE, "engine"), (PROGRAM, "recorded program")]
        heads = [{"name": "thread_name", "ph": "M", "pid": 1, "tid": row, "args": {"name": name}} for row, name in names]
        path.write_text(json.dumps({"traceEvents": [*heads, *self.events]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="decode steps to trace")
    parser.add_argument("--out", type=Path, default=Path("trace.json"))
    args = parser.parse_args()
    # one step after the other: a program notes one run at a time
    engine = build_engine(config_from_kwargs(args.model, kv_cache_memory_bytes=1 << 30, async_scheduling=False))
    rng = np.random.default_rng(0)
    for i in range(args.streams):
        ids = rng.integers(3, min(engine.facts.vocab_size, 40000), args.prompt).tolist()
        params = SamplingParams(temperature=0, max_tokens=10_000 // args.streams, ignore_eos=True)
        engine.core.add(GenerateRequest(request_id=str(i), prompt_token_ids=ids, params=params))
    while engine.core.stats().generation_tokens < 20 * args.streams:
        engine.core.step()
    trace, forward = Trace(), engine.executor.runner._forward
    trace.around(engine.core._scheduler, "schedule", "plan")
    trace.around(engine.core, "settle", "settle")
    trace.around(engine.executor, "forward", "forward")
    trace.around(engine.executor, "sample", "sample")
    if isinstance(forward, Recorded):
        forward.program.trace(True)
    for number in range(args.steps):
        begun = time.monotonic()
        engine.core.step()
        trace.add(f"step {number}", ENGINE, begun, time.monotonic() - begun)
        if isinstance(forward, Recorded):
            for op, start, seconds in forward.program.stage_times():
                trace.add(op, PROGRAM, start, seconds)
    trace.write(args.out)
    print(f"{len(trace.events)} events in {args.out}")


if __name__ == "__main__":
    main()
