"""Everything that needs a GPU, in one command: `make gpu-check`, or `python3 scripts/gpu_check.py` with any Python that has torch.

    environment -> kernels against the references -> engine against transformers -> what has a bar -> the rest -> report

It runs from the checkout, nothing is installed. Wheels of packages that this Python lacks may lie in a folder (--wheels .whl): they
are unpacked into a temporary one. Each part is a process of its own with a time limit: what fails or hangs costs its own line of the
report, which is written anew after every part. 25 minutes in all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 24 * 60.0
SHORTEST = 10.0  # seconds that a part must have left to be started
_ENGINE = ["benchmarks/gpu_engine.py"]
_VERSIONS = """
import importlib.metadata as m, platform, sys
names = ("torch", "triton", "transformers", "numpy", "msgspec", "tokenizers", "ml_dtypes", "array_api_compat", "jinja2", "pytest")
print("Python", platform.python_version())
missing = []
for name in names:
    try:
        print(name, m.version(name))
    except m.PackageNotFoundError:
        missing.append(name)
import torch
assert torch.cuda.is_available(), "torch sees no GPU"
p = torch.cuda.get_device_properties(0)
print(p.name, f"sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}")
sys.exit("missing: " + ", ".join(missing) if missing else 0)
"""


@dataclass
class Part:
    """One command. `bar`: (what, figure of its JSON, comparison, number)."""

    name: str
    command: list[str]
    seconds: float
    bar: tuple[str, str, str, float] | None = None
    status: str = "not run"
    took: float = 0.0
    tail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def parts() -> list[Part]:
    def engine(shape: str, requests: int, num_input: int, num_output: int, *more: str) -> list[str]:
        sizes = ["--requests", str(requests), "--input", str(num_input), "--output", str(num_output)]
        return [*_ENGINE, "--shape", shape, *sizes, *more]

    quiet = ["-m", "pytest", "-p", "no:warnings", "--maxfail=30"]
    workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []  # most of these tests' time is a compiler's, on one core
    invariant = ["--set", "batch_invariant=true"]
    step = ("batch-1 decode step over bytes / measured bandwidth, at most 1.35", "step_over_bytes", "<=", 1.35)
    return [
        Part("environment", ["-c", _VERSIONS], 120),
        Part("kernels against the references", [*quiet, *workers, "-m", "not long", "tests/kernels_triton", "--ignore=tests/kernels_triton/test_aot.py"], 400),
        Part("engine against transformers, graphs, batch invariance", [*quiet, "tests/gpu"], 400),
        Part("Llama-3.1-8B shape, one request, greedy", engine("llama-3.1-8b", 1, 128, 512, "--temperature", "0", "--ceiling"), 240, step),
        Part("Llama-3.1-8B shape, one request, sampled", engine("llama-3.1-8b", 1, 128, 256, "--ceiling"), 200),
        Part("Llama-3.1-8B shape, 256 x 1024 in, 1024 out", engine("llama-3.1-8b", 256, 1024, 1024), 240,
             ("output tokens/s, at least 9,000", "output_tokens_per_s", ">=", 9000)),
        Part("Qwen3-0.6B shape, batch 256", engine("qwen3-0.6b", 256, 128, 1024), 150,
             ("output tokens/s, at least 25,000", "output_tokens_per_s", ">=", 25000)),
        Part("native library, for draws on the host", ["pagoda/csrc/build.py"], 240),
        Part("Qwen3-0.6B shape, batch 256, steps one after the other", engine("qwen3-0.6b", 256, 128, 512, "--set", "async_scheduling=false"), 120),
        Part("Llama-3.1-8B shape, 64 x 512 in, 256 out", engine("llama-3.1-8b", 64, 512, 256), 150),
        Part("the same, --batch-invariant", engine("llama-3.1-8b", 64, 512, 256, *invariant), 150),
        Part("Qwen3-8B shape, 256 x 1024 in, 1024 out", engine("qwen3-8b", 256, 1024, 1024), 240),
        Part("ops against the GPU's limits", ["-m", "pagoda.kernels.triton.bench"], 150),
    ]  # fmt: skip


def run(part: Part, left: float, environment: dict[str, str]) -> None:
    """Never raises: what went wrong is the part's status."""
    limit = min(part.seconds, left)
    if limit < SHORTEST:
        part.status = "no time left"
        return
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *part.command], cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=limit
        )
        part.status = "ok" if done.returncode == 0 else f"failed (exit {done.returncode})"
        output, errors = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        part.status = f"stopped after {limit:.0f} s"
        output, errors = (x.decode(errors="replace") if isinstance(x, bytes) else x or "" for x in (error.stdout, error.stderr))
    except OSError as error:
        part.status, output, errors = f"could not be started: {error}", "", ""
    part.took = time.monotonic() - begun
    part.tail = "\n".join((output + "\n" + errors).strip().splitlines()[-40:])
    for line in output.splitlines():
        if line.startswith("{") and '"shape"' in line:
            part.figures = json.loads(line)


def verdict(part: Part) -> str:
    if part.bar is None:
        return ""
    what, name, comparison, bar = part.bar
    value = part.figures.get(name)
    if value is None:
        return f"{what}: not measured"
    is_met = value <= bar if comparison == "<=" else value >= bar
    return f"{what}: {value:,} {'met' if is_met else 'MISSED'}"


def report(found: list[Part], path: Path) -> None:
    command = f"make gpu-check ARGS={shlex.quote(' '.join(sys.argv[1:]))}" if sys.argv[1:] else "make gpu-check"
    lines = [f"# GPU check, {time.strftime('%Y-%m-%d %H:%M')}", "", f"Command: `{command}`.", ""]
    lines += ["| part | result | seconds | bar |", "|---|---|---|---|"]
    lines += [f"| {p.name} | {p.status} | {p.took:.0f} | {verdict(p)} |" for p in found]
    rows = [p for p in found if p.figures]
    if rows:
        lines += ["", "| workload | output tokens/s | step ms | TTFT p50 ms | ITL p50 / p99 ms | TB/s of step | host us | start s |", "|---" * 8 + "|"]
    for p in rows:
        f = p.figures
        ttft, itl = f["ttft_ms"], f["itl_ms"]
        achieved = (f.get("achieved_bytes_per_s") or 0) / 1e12
        lines.append(
            f"| {p.name} | {f['output_tokens_per_s']:,} | {f['step_ms']} | {ttft.get('p50')} | {itl.get('p50')} / {itl.get('p99')} "
            f"| {achieved:.2f} | {f['host_us']} | {f['start_s']} |"
        )
    for p in found:
        command = " ".join("..." if "\n" in word else word for word in p.command)
        lines += ["", f"## {p.name}", "", f"`python3 {command}`: {p.status}, {p.took:.0f} s", "", "```", p.tail.replace("```", "'''"), "```"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def unpack(wheels: Path, folder: str) -> str:
    """Installs the wheels into the folder; what went wrong, or ""."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    if not files:
        return f"no wheels in {wheels}"
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", folder]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *files], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip()[-500:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="folder of wheels this Python lacks (default: .whl, if it is there)")
    parser.add_argument("--out", type=Path, default=ROOT / f"docs/benchmarks/{time.strftime('%Y-%m-%d')}-gpu-check.md")
    parser.add_argument("--only", default="", help="parts whose name has this text")
    parser.add_argument("--without", default="", metavar="TEXT,...", help="no parts whose names have one of these texts")
    parser.add_argument("--begin", type=int, default=1, metavar="N", help="with part number N, where one command may not take as long as all of them")
    parser.add_argument("--minutes", type=float, default=BUDGET / 60)
    args = parser.parse_args()
    begun = time.monotonic()
    chosen = [part for part in parts()[args.begin - 1 :] if args.only.lower() in part.name.lower()]
    chosen = [part for part in chosen if not any(text.lower() in part.name.lower() for text in args.without.split(",") if text)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT)]
        if args.wheels.is_dir():
            problem = unpack(args.wheels, folder)
            print(problem or f"wheels of {args.wheels} unpacked", flush=True)
            paths.insert(0, folder)
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
                       "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
        for part in chosen:
            run(part, args.minutes * 60 - (time.monotonic() - begun), environment)
            print(f"{part.name}: {part.status}, {part.took:.0f} s. {verdict(part)}", flush=True)
            if part.status != "ok":
                print("\n".join(part.tail.splitlines()[-15:]), flush=True)
            report(chosen, args.out)
    print(f"report: {args.out}")
    return 0 if all(part.status == "ok" and "MISSED" not in verdict(part) for part in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
