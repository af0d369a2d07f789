"""What a long prompt costs the streams beside it: `python benchmarks/neighbours.py`.

With 16 streams decoding, a 2,048-token prompt arrives. Printed: p99 time between tokens of the 16 while it is computed
against the undisturbed p99, and the newcomer's time to first token against its time on an idle engine. Medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise

import numpy as np

from pagoda.base.config import config_from_kwargs
from pagoda.base.types import GenerateRequest, SamplingParams
from pagoda.bench.report import machine_line
from pagoda.engine.core import EngineCore
from pagoda.executor.launch import build_engine


class Round:
    """One engine, driven by hand, with the arrival time of every token."""

    def __init__(self, core: EngineCore, vocab: int, seed: int) -> None:
        self.core, self.rng, self.vocab = core, np.random.default_rng(seed), vocab
        self.arrivals: dict[str, list[float]] = {}

    def add(self, name: str, length: int, max_tokens: int) -> float:
        ids = self.rng.integers(3, self.vocab, length).tolist()
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.core.add(GenerateRequest(request_id=name, prompt_token_ids=ids, params=params))
        self.arrivals[name] = []
        return time.perf_counter()

    def step(self) -> None:
        for out in self.core.step():
            if out.new_token_ids:
                self.arrivals[out.request_id].append(time.perf_counter())

    def until_first(self, name: str) -> float:
        while not self.arrivals[name]:
            self.step()
        return self.arrivals[name][0]

    def gaps(self, names: list[str], start: float, stop: float) -> list[float]:
        found = []
        for name in names:
            times = self.arrivals[name]
            found += [b - a for a, b in pairwise(times) if a >= start and b <= stop]
        return found

    def drain(self) -> None:
        while self.core.has_work():
            self.step()


def p99(values: list[float]) -> float:
    return float(np.quantile(values, 0.99))


def measure(core: EngineCore, vocab: int, seed: int, args: argparse.Namespace) -> dict[str, float]:
    idle = Round(core, vocab, seed)
    begun = idle.add("alone", args.prompt, 1)
    ttft_idle = idle.until_first("alone") - begun
    idle.drain()
    busy = Round(core, vocab, seed + 1)
    names = [f"s{i}" for i in range(args.streams)]
    for name in names:
        busy.add(name, 64, 4000)
    for name in names:
        busy.until_first(name)
    for _ in range(20):
        busy.step()
    quiet_from = time.perf_counter()
    for _ in range(60):
        busy.step()
    begun = busy.add("newcomer", args.prompt, 1)
    first = busy.until_first("newcomer")
    disturbed, undisturbed = busy.gaps(names, begun - 1e-3, first), busy.gaps(names, quiet_from, begun)
    core.abort([*names, "newcomer"])
    busy.drain()
    return {
        "undisturbed p99 ITL, ms": p99(undisturbed) * 1e3,
        "disturbed p99 ITL, ms": p99(disturbed) * 1e3,
        "ITL ratio": p99(disturbed) / p99(undisturbed),
        "idle TTFT, s": ttft_idle,
        "TTFT beside streams, s": first - begun,
        "TTFT ratio": (first - begun) / ttft_idle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--itl-target-ms", type=float, help="as the flag of `pagoda serve`; 0 turns pacing off")
    parser.add_argument("--linear-activations", default="auto", choices=["auto", "int8", "int16"])
    args = parser.parse_args()
    engine = build_engine(
        config_from_kwargs(
            args.model,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=1 << 30,
            itl_target_ms=args.itl_target_ms,
            linear_activations=args.linear_activations,
        )
    )
    rounds = [measure(engine.core, min(engine.facts.vocab_size, 40000), seed, args) for seed in range(args.rounds + 1)][1:]
    print(machine_line())
    print(f"{args.streams} streams, a prompt of {args.prompt} tokens; medians of {args.rounds} rounds (min to max)")
    for name in rounds[0]:
        values = [r[name] for r in rounds]
        print(f"  {name:26s}{statistics.median(values):9.3f}   ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    main()
