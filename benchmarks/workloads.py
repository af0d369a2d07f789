"""The six workloads on this machine, beside its limits: `make bench`, or `python benchmarks/workloads.py --help`.

    W1  one stream, 128 tokens in, 128 out        W4  64 mixed requests (32-512 in, 32-256 out), all at once
    W2  one prompt of 512 and of 2,048, 1 out     W5  32 requests sharing 512 tokens, 32 + 32 each, all at once
    W3  32 streams, 128 in, 128 out               W6  the server: 16 closed-loop streaming clients, 64 requests

Token ids are random and fresh in every round, so that no cache of an earlier round helps. Rounds of all workloads are
interleaved; figures are medians, with the spread. Ceilings (memory bandwidth, dot products) are measured before. With
`--report` the figures go to docs/benchmarks as Markdown, with a plot where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import resource
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagoda.base.config import EngineConfig, config_from_kwargs
from pagoda.base.types import GenerateRequest, SamplingParams
from pagoda.bench.client import Client
from pagoda.bench.report import machine_line
from pagoda.bench.server_process import running_server
from pagoda.csrc.build import build_roofline
from pagoda.executor.launch import LocalEngine, build_engine

ROOT = Path(__file__).resolve().parents[1]
Requests = list[tuple[list[int], int]]
OFFLINE = ("W1", "W2-512", "W2-2048", "W3", "W4", "W5")


def ids(count: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40000) for _ in range(count)]


def requests(workload: str, round: int) -> Requests:
    """(prompt, tokens wanted) of a workload; lengths are fixed, ids are the round's own."""
    seed = 100_000 * (round + 1) + 7919 * sum(map(ord, workload))
    if workload == "W1":
        return [(ids(128, seed), 128)]
    if workload.startswith("W2"):
        return [(ids(int(workload[3:]), seed), 1)]
    if workload == "W3":
        return [(ids(128, seed + i), 128) for i in range(32)]
    if workload == "W5":
        shared = ids(512, seed)
        return [(shared + ids(32, seed + 1 + i), 32) for i in range(32)]
    lengths = random.Random(1234 if workload == "W4" else 4321)
    low, high, out_low, out_high = (32, 512, 32, 256) if workload == "W4" else (64, 256, 48, 144)
    pairs = [(lengths.randint(low, high), lengths.randint(out_low, out_high)) for _ in range(64)]
    return [(ids(count, seed + i), wanted) for i, (count, wanted) in enumerate(pairs)]


def run_offline(engine: LocalEngine, workload: str, round: int) -> dict[str, float]:
    """Seconds of a workload in this process, and what follows from them."""
    core, todo = engine.core, requests(workload, round)
    for i, (prompt, wanted) in enumerate(todo):
        params = SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True)
        core.add(GenerateRequest(request_id=f"{workload}-{round}-{i}", prompt_token_ids=prompt, params=params))
    started, first, steps = time.perf_counter(), 0.0, 0
    forward = engine.executor.runner._forward
    before = forward.seconds
    while core.has_work():
        outputs = core.step()
        steps += 1
        if not first and any(out.new_token_ids for out in outputs):
            first = time.perf_counter() - started
    wall = time.perf_counter() - started
    tokens = sum(wanted for _, wanted in todo)
    found = {"wall s": wall, "out tok/s": tokens / wall, "host us/step": (wall - (forward.seconds - before)) / steps * 1e6}
    if workload == "W1":
        found["decode tok/s"] = (tokens - 1) / (wall - first)
    if workload.startswith("W2"):
        found["prefill tok/s"] = len(todo[0][0]) / wall
    return found


async def run_server(base_url: str, round: int) -> dict[str, float]:
    """W6 against a running server."""
    client = Client(base_url, backend="openai")
    client._model = await client.first_model()
    todo = requests("W6", round)
    exchanges = []

    async def worker() -> None:
        while todo:
            prompt, wanted = todo.pop()
            exchanges.append(
                await client.send(prompt, len(prompt), max_tokens=wanted, temperature=0, ignore_eos=True)
            )

    started = time.perf_counter()
    await asyncio.gather(*[worker() for _ in range(16)])
    wall = time.perf_counter() - started
    await client.close()
    failed = [e.error for e in exchanges if not e.is_ok]
    assert not failed, failed[0]
    gaps = sorted(gap for e in exchanges for gap in e.itls)
    firsts = sorted(e.ttft for e in exchanges)
    return {
        "wall s": wall,
        "req/s": len(exchanges) / wall,
        "out tok/s": sum(e.output_len for e in exchanges) / wall,
        "TTFT p50 ms": firsts[len(firsts) // 2] * 1e3,
        "TTFT p99 ms": firsts[int(0.99 * len(firsts))] * 1e3,
        "ITL p50 ms": gaps[len(gaps) // 2] * 1e3,
        "ITL p99 ms": gaps[int(0.99 * len(gaps))] * 1e3,
    }


def ceilings(num_threads: int) -> dict[str, float]:
    """What the machine can do now: GB/s from memory, GFLOP/s of the dot products."""
    text = subprocess.run([build_roofline(), str(num_threads)], capture_output=True, text=True, check=True).stdout
    return {name: float(value) for name, value in re.findall(r"^(\S+) ([\d.]+) G", text, re.M)}


def fractions(engine: LocalEngine, found: dict[str, dict[str, float]], limits: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Shares of the machine's ceilings: bytes of weights per decoded token, multiply-adds of a prompt."""
    weights = engine.ledger.weights_nbytes
    if "W1" in found:
        gbs = weights * found["W1"]["decode tok/s"] / 1e9
        yield "W1 decode", f"{gbs:.1f} GB/s of weights, {gbs / limits['memory']:.0%} of the {limits['memory']:.0f} GB/s memory gives"
    table = engine.facts.vocab_size * engine.source.spec.hidden_size
    flops = 2 * (engine.facts.num_parameters - table)
    for name in ("W2-512", "W2-2048"):
        if name in found:
            rate = flops * found[name]["prefill tok/s"] / 1e9
            kind = ceiling_of(engine, limits)
            yield name, f"{rate:.0f} GFLOP/s in linear layers, {rate / limits[kind]:.0%} of the {limits[kind]:.0f} of {kind} products"


def ceiling_of(engine: LocalEngine, limits: dict[str, float]) -> str:
    """Whose products most of a prompt's are, of those this machine was measured for."""
    formats = engine.ledger.formats
    if not any(name.startswith(("q", "i8")) for name in formats):
        return "bf16" if "bf16" in limits else "fp32"
    if not any(name.endswith("_a8") or name == "i8" for name in formats):
        return "int16"
    return "int8" if "int8" in limits else "int4" if any(name.startswith("q4") for name in formats) else "int16"


def medians(samples: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {name: {key: statistics.median(s[key] for s in runs) for key in runs[0]} for name, runs in samples.items()}


def measure(config: EngineConfig, args: argparse.Namespace) -> dict[str, Any]:
    wanted = args.work.split(",")
    engine = build_engine(config)
    limits = ceilings(int(engine.config.device.num_threads or 1))
    samples: dict[str, list[dict[str, float]]] = defaultdict(list)
    run_offline(engine, "W1", 999)
    for round in range(args.rounds):
        for name in (w for w in wanted if w in OFFLINE):
            samples[name].append(run_offline(engine, name, round))
            print(f"round {round} {name}: " + ", ".join(f"{k} {v:.4g}" for k, v in samples[name][-1].items()), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if "W6" in wanted:
        with running_server(config) as server:
            asyncio.run(run_server(server.base_url, 999))
            for round in range(args.rounds):
                samples["W6"].append(asyncio.run(run_server(server.base_url, round)))
                print(f"round {round} W6: " + ", ".join(f"{k} {v:.4g}" for k, v in samples["W6"][-1].items()), flush=True)
    found = medians(samples)
    return {
        "title": args.title or ", ".join([Path(str(args.model or "default model")).name, *args.set]),
        "machine": machine_line(),
        "date": time.strftime("%Y-%m-%d"),
        "rounds": args.rounds,
        "formats": ", ".join(engine.ledger.formats),
        "kv": engine.config.cache.kv_cache_dtype,
        "ceilings": limits,
        "ceiling": ceiling_of(engine, limits),
        "medians": found,
        "samples": dict(samples),
        "fractions": dict(fractions(engine, found, limits)),
        "peak MiB": peak,
    }


def markdown(result: dict[str, Any], command: str) -> str:
    lines = [
        f"# {result['title']}: workloads W1 to W6, {result['date']}",
        "",
        f"{result['machine']}; weights {result['formats']}, KV cache {result['kv']}. Medians of {result['rounds']} interleaved rounds "
        "(min to max). Command:",
        "",
        f"    {command}",
        "",
        "Ceilings measured just before: " + ", ".join(f"{k} {v:g} G/s" for k, v in result["ceilings"].items()) + ".",
        f"Peak resident memory of the offline run: {result['peak MiB']:.0f} MiB.",
        "",
        "| workload | figure | median | min | max |",
        "|---|---|---|---|---|",
    ]
    for name, figures in result["medians"].items():
        for key, value in figures.items():
            values = [s[key] for s in result["samples"][name]]
            lines.append(f"| {name} | {key} | {value:.4g} | {min(values):.4g} | {max(values):.4g} |")
    lines += ["", *(f"- {name}: {text}" for name, text in result["fractions"].items()), ""]
    return "\n".join(lines)


def compare(result: dict[str, Any]) -> list[str]:
    """What moved against the newest committed report of the same title: ratios, larger is faster, and the same in terms of what
    the machine gave then and now (W1 of its memory, the rest of its products): that is what is marked."""
    earlier = sorted((ROOT / "docs/benchmarks").glob(f"*-{slug(result['title'])}.json"))
    if not earlier:
        return ["no earlier report to compare with: `--report` writes one"]
    before = json.loads(earlier[-1].read_text())
    then, now = before["ceilings"], result["ceilings"]
    both = ", ".join(f"{kind} {then[kind]:g} and {now[kind]:g} G/s" for kind in now if kind in then)
    lines = [f"against {earlier[-1].name} (ceilings then and now: {both})"]
    if before["machine"] != result["machine"]:
        lines.append(f"  that was another machine, so most of this is its difference: {before['machine']}")
    for name, figures in result["medians"].items():
        kind = "memory" if name == "W1" else result["ceiling"]
        drift = now[kind] / then.get(kind, now[kind])
        for key in (k for k in figures if k in before["medians"].get(name, {})):
            old, new = before["medians"][name][key], figures[key]
            ratio = new / old if key.endswith("/s") else old / new
            flag = "  <-- slower" if ratio / drift < 0.9 else "  <-- faster" if ratio / drift > 1.1 else ""
            lines.append(f"  {name:8s} {key:14s} {old:10.4g} -> {new:10.4g}   {ratio:5.2f}x, of the machine's {ratio / drift:5.2f}x{flag}")
    return lines


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def plot(result: dict[str, Any], path: Path) -> bool:
    """Tokens per second by workload; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4))
    axes = figure.subplots()
    keys = {"W1": "decode tok/s", "W2-512": "prefill tok/s", "W2-2048": "prefill tok/s"}
    names = list(result["medians"])
    values = [result["medians"][n][keys.get(n, "out tok/s")] for n in names]
    axes.bar(names, values)
    for x, value in enumerate(values):
        axes.text(x, value, f"{value:.0f}", ha="center", va="bottom")
    axes.set_ylabel("tokens/s")
    axes.set_title(f"{result['title']}, {result['date']}\n{platform.machine()}")
    figure.tight_layout()
    figure.savefig(path)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--work", default="W1,W2-512,W2-2048,W3,W4,W5,W6")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="engine option, as in LLM(name=value)")
    parser.add_argument("--title")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--report", action="store_true", help="write docs/benchmarks/DATE-TITLE.md")
    parser.add_argument("--compare", action="store_true", help="say what moved since the last report of this title")
    args = parser.parse_args()
    options: dict[str, Any] = {"kv_cache_memory_bytes": 2 << 30, "max_model_len": 4096}
    for item in args.set:
        name, _, value = item.partition("=")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    result = measure(config_from_kwargs(args.model, **options), args)
    command = "python benchmarks/workloads.py" + "".join(f" --set {item}" for item in args.set)
    text = markdown(result, command)
    print("\n" + text)
    if args.compare:
        print("\n".join(compare(result)))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.report:
        folder = ROOT / "docs/benchmarks"
        folder.mkdir(exist_ok=True)
        stem = f"{result['date']}-{slug(result['title'])}"
        if plot(result, folder / f"{stem}.png"):
            text += f"\n![tokens per second by workload]({stem}.png)\n"
        (folder / f"{stem}.md").write_text(text)
        kept = {key: result[key] for key in ("title", "date", "machine", "ceilings", "medians")}
        (folder / f"{stem}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
