"""What a step costs the host on a GPU: `python benchmarks/gpu_host_cost.py [--report]`. Needs no GPU.

The engine core, the batch preparation and the settling of a decoding step, with two steps in flight, against 1 to 1,024 running
requests, on the null device with kernels that are not started: what is measured is all that Python does, but for the launches
themselves (a graph, and six kernels around it). Every request meets a new KV block each 16 tokens, as in life. Minima over
rounds of the mean of 64 steps, in microseconds.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

from pagoda.base.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagoda.base.types import GenerateRequest, KvGroup, ModelFacts, SamplingParams
from pagoda.bench.report import machine_line
from pagoda.engine.core import EngineCore
from pagoda.executor.uniproc import UniprocExecutor
from pagoda.kernels.triton.prepare import StateLayout
from pagoda.worker.batch import Sizes
from pagoda.worker.device import Null
from pagoda.worker.device_graphs import DeviceForward
from pagoda.worker.device_runner import DeviceRunner
from pagoda.worker.device_state import DeviceState
from pagoda.worker.table import RequestTable

ROOT = Path(__file__).resolve().parents[1]
BLOCK, MAX_LEN, PROMPT, VOCAB = 16, 4096, 20, 1000
RUNNING = (1, 4, 16, 64, 128, 256, 512, 1024)
STEPS = 64


def make(num_seqs: int) -> tuple[EngineCore, DeviceRunner]:
    """A core on a worker that has no model."""
    facts = ModelFacts(
        architecture="none", vocab_size=VOCAB, max_model_len=MAX_LEN, num_layers=1, kv_groups=(KvGroup(kind="full", layers=(0,)),),
        num_kv_planes=1, num_kv_heads=1, head_dim=64, dtype="bfloat16",
    )  # fmt: skip
    config = EngineConfig(
        model=ModelConfig(dtype="bfloat16", max_model_len=MAX_LEN),
        cache=CacheConfig(block_size=BLOCK, kv_cache_dtype="bfloat16"),
        scheduler=SchedulerConfig(max_num_seqs=num_seqs, max_num_batched_tokens=max(8192, num_seqs * PROMPT), itl_target_ms=0),
    )
    tokens, blocks = max(8192, num_seqs * PROMPT), MAX_LEN // BLOCK
    device = Null(computes=False, total=1 << 40)
    sizes = Sizes(max_tokens=tokens, max_seqs=num_seqs, max_rows=num_seqs, max_blocks=blocks)
    state = DeviceState(device, StateLayout(num_seqs, MAX_LEN, 1, blocks), sizes, BLOCK, num_steps=2, computes=False)
    table = RequestTable(max_num_seqs=num_seqs, max_model_len=MAX_LEN, num_groups=1, max_blocks=blocks)
    forward = DeviceForward(device, None, state.inputs, ())  # type: ignore[arg-type]
    runner = DeviceRunner(device, table, state, forward, None, sizes, VOCAB, num_steps=2, computes=False)  # type: ignore[arg-type]
    core = EngineCore(config, facts, 1 + num_seqs * blocks, UniprocExecutor(runner), max_logits_rows=num_seqs, pipeline_depth=2)
    return core, runner


def step_cost(num_running: int, rounds: int) -> dict[str, float]:
    """Microseconds of a step, and of its parts: plan (with launching bookkeeping), prepare, settle (with reading ids)."""
    core, runner = make(num_running)
    for i in range(num_running):
        params = SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=MAX_LEN - PROMPT - 1, ignore_eos=True)
        ids = [(i * 7 + k) % VOCAB for k in range(PROMPT)]
        core.add(GenerateRequest(request_id=str(i), prompt_token_ids=ids, params=params))
    for _ in range(8):
        core.step()
    spent = {"prepare": 0.0, "results": 0.0}
    forward, sample = runner.forward, runner.sample

    def timed_forward(plan):  # type: ignore[no-untyped-def]
        begun = time.thread_time()
        forward(plan)
        spent["prepare"] += time.thread_time() - begun

    def timed_sample(step, masks=None):  # type: ignore[no-untyped-def]
        begun = time.thread_time()
        result = sample(step, masks)
        spent["results"] += time.thread_time() - begun
        return result

    runner.forward, runner.sample = timed_forward, timed_sample  # type: ignore[method-assign]
    gc.collect()
    gc.freeze()  # as the engine process does after loading
    best = {"step": float("inf")}
    for _ in range(rounds):
        spent.update(prepare=0.0, results=0.0)
        begun = time.thread_time()
        for _ in range(STEPS):
            core.step()
        seconds = time.thread_time() - begun
        if seconds < best["step"]:
            best = {"step": seconds, **spent}
    assert len(core._scheduler.running) == num_running and len(core._in_flight) == 1
    best["plan and settle"] = best["step"] - best["prepare"] - best["results"]
    return {name: value / STEPS * 1e6 for name, value in best.items()}


def plot(rows: list[tuple[int, dict[str, float]]], path: Path) -> bool:
    """Log-log; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    for name in rows[0][1]:
        axes.loglog([n for n, _ in rows], [cost[name] for _, cost in rows], marker="o", label=name)
    axes.axhline(1000, color="grey", linestyle="--", linewidth=0.8)
    axes.set_xlabel("running requests")
    axes.set_ylabel("microseconds a step")
    axes.legend()
    axes.grid(True, which="major", alpha=0.4)
    figure.tight_layout()
    figure.savefig(path)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="write docs/benchmarks/DATE-gpu-host-cost.md and a plot")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--running", default=",".join(map(str, RUNNING)))
    args = parser.parse_args()
    print(machine_line() + "\n")
    rows = [(int(n), step_cost(int(n), args.rounds)) for n in args.running.split(",")]
    names = list(rows[0][1])
    lines = [f"| running | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {n:,} | {' | '.join(f'{cost[name]:,.0f}' for name in names)} |" for n, cost in rows]
    print("\n".join(lines))
    if args.report:
        date = time.strftime("%Y-%m-%d")
        folder = ROOT / "docs/benchmarks"
        text = f"# What a step on a GPU costs the host, {date}\n\n{machine_line()}. Command: `python benchmarks/gpu_host_cost.py --report`.\n\n"
        text += "Microseconds of one core (time of the thread) per decoding step, two steps in flight, on the null device: everything but starting kernels.\n\n"
        text += "\n".join(lines) + "\n"
        if plot(rows, folder / f"{date}-gpu-host-cost.png"):
            text += f"\n![microseconds a step against running requests]({date}-gpu-host-cost.png)\n"
        (folder / f"{date}-gpu-host-cost.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
