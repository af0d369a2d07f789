"""What scheduling costs, without a model: `python benchmarks/scale.py [--report]`.

One step of pure decoding (plan, settle; a worker that answers at once) against 1 to 2,000 running requests, and against pools of
1,000 to 1,000,000 blocks at 64 running. Prefix lookup of a 1,000-block prompt against the size of the pool. Medians, in
microseconds.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from pagoda.base.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagoda.base.plan import Masks, StepPlan, StepResult, StepRow
from pagoda.base.types import GenerateRequest, KvGroup, ModelFacts, SamplingParams
from pagoda.bench.report import machine_line
from pagoda.engine.core import EngineCore

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 16
RUNNING = (1, 4, 16, 64, 256, 1000, 2000)
BLOCKS = (1_000, 10_000, 100_000, 1_000_000)


class Instant:
    """An executor whose model always says 7."""

    def __init__(self) -> None:
        self.plan = StepPlan(step=-1)
        self.known: dict[int, int] = {}

    def forward(self, plan: StepPlan) -> None:
        self.plan = plan
        for new in plan.new:
            self.known[new.slot] = len(new.token_ids)

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        rows = []
        for row in self.plan.scheduled:
            is_sampled = row.num_computed + row.num_planned == self.known[row.slot]
            self.known[row.slot] += is_sampled
            rows.append(StepRow(slot=row.slot, token_ids=[7] if is_sampled else []))
        return StepResult(step=step, rows=rows)

    def call(self, method: str, *args: object) -> object:
        return None

    def check(self) -> None: ...

    def stop(self) -> None: ...


def core(num_blocks: int, max_num_seqs: int) -> EngineCore:
    facts = ModelFacts(
        architecture="none", vocab_size=100, max_model_len=40_000, num_layers=1, kv_groups=(KvGroup(kind="full", layers=(0,)),),
        num_kv_planes=1, num_kv_heads=1, head_dim=64, dtype="float32",
    )  # fmt: skip
    config = EngineConfig(
        model=ModelConfig(dtype="float32", max_model_len=40_000),
        cache=CacheConfig(block_size=BLOCK, kv_cache_dtype="float32"),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=200_000),
    )
    return EngineCore(config, facts, num_blocks, Instant(), max_logits_rows=max_num_seqs)


def step_cost(num_blocks: int, num_running: int) -> float:
    """Median seconds of a step in which `num_running` requests decode."""
    engine = core(num_blocks, num_running)
    for i in range(num_running):
        params = SamplingParams(temperature=0, max_tokens=5_000, ignore_eos=True)
        engine.add(GenerateRequest(request_id=str(i), prompt_token_ids=[i % 90] * 20, params=params))
    for _ in range(5):
        engine.step()
    gc.collect()
    gc.freeze()  # as the engine process does after loading
    times = []
    for _ in range(60):
        begun = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def lookup_cost(num_blocks: int) -> float:
    """Median seconds of admitting a request whose 1,000 blocks are cached in a full pool, hashing included."""
    engine = core(num_blocks, 4)
    prompt = [i % 97 for i in range(1000 * BLOCK + 1)]

    def run(name: str, ids: list[int]) -> float:
        engine.add(GenerateRequest(request_id=name, prompt_token_ids=ids, params=SamplingParams(temperature=0, max_tokens=1)))
        begun = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - begun
        while engine.has_work():
            engine.step()
        return seconds

    for i in range((num_blocks - 1200) // 1000):  # others' blocks, so that the index and the LRU list are full
        run(f"fill{i}", [i % 100, *prompt[1:]])
    run("first", prompt)
    return statistics.median(run(f"again{i}", prompt) for i in range(5))


def table(title: str, head: str, cost: Callable[[int], float], sizes: tuple[int, ...]) -> tuple[str, list[tuple[int, float]]]:
    rows = [(size, cost(size) * 1e6) for size in sizes]
    lines = [f"| {head} | us |", "|---|---|", *(f"| {size:,} | {us:,.0f} |" for size, us in rows)]
    text = f"{title}\n\n" + "\n".join(lines) + "\n"
    print(text, flush=True)
    return text, rows


def plot(curves: dict[str, list[tuple[int, float]]], path: Path) -> bool:
    """Log-log; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for name, rows in curves.items():
        axes.loglog(*zip(*rows, strict=True), marker="o", label=name)
    axes.set_ylabel("us")
    axes.set_xlabel("running requests, or blocks of the pool")
    axes.legend()
    axes.grid(True, which="major", alpha=0.4)
    figure.tight_layout()
    figure.savefig(path)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write docs/benchmarks/DATE-scale.md and a plot")
    args = parser.parse_args()
    print(machine_line() + "\n")
    parts = [
        table("A step against running requests (100,000 blocks)", "running", lambda n: step_cost(100_000, n), RUNNING),
        table("A step against the pool (64 running)", "blocks", lambda n: step_cost(n, 64), BLOCKS),
        table("Admission of a cached prompt of 1,000 blocks, against a full pool", "blocks", lookup_cost, (2_000, 10_000, 100_000)),
    ]
    if args.report:
        folder = ROOT / "docs/benchmarks"
        folder.mkdir(exist_ok=True)
        date = time.strftime("%Y-%m-%d")
        curves = dict(zip(("step / running", "step / blocks", "lookup / blocks"), (rows for _, rows in parts), strict=True))
        text = f"# What scheduling costs, {date}\n\n{machine_line()}. Command: `python benchmarks/scale.py --report`.\n\n"
        text += "\n".join(part for part, _ in parts)
        if plot(curves, folder / f"{date}-scale.png"):
            text += f"\n![cost of scheduling]({date}-scale.png)\n"
        (folder / f"{date}-scale.md").write_text(text)


if __name__ == "__main__":
    main()
