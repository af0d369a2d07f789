"""`make bench-peers`: Pagoda, llama.cpp, OpenVINO GenAI, vLLM and transformers on this machine, interleaved.

    python -m benchmarks.peers --peers llama.cpp,openvino --work W1,W3 --rounds 5 --precision 4bit,8bit,bf16

Each peer is installed into an environment of its own under build/peers, which git ignores; one that cannot be is reported
as absent. All get the same token ids and must give the same numbers of tokens, greedily, on the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import PEERS, PRECISIONS, Contender, chosen
from benchmarks.peers.environments import CACHE, ROOT, PeerAbsent, versions
from benchmarks.peers.offline import run_rounds, start_workers
from benchmarks.peers.quality import run_quality
from benchmarks.peers.report import markdown, plot
from benchmarks.peers.servers import run_memory, run_starts, run_w6
from pagoda.bench.report import machine_line

OFFLINE = ("W1", "W2-512", "W2-2048", "W3", "W4", "W5")
WORK = ("quality", "start", "memory", *OFFLINE, "W6")


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that no engine stays behind
    absent: dict[str, str] = {}
    contenders = prepared(chosen(args.peers, args.precision), absent)
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "rounds": args.rounds, "absent": absent, "samples": {}}
    result |= {"threads": args.threads, "machine": machine_line(), "commands": [" ".join(["python -m benchmarks.peers", *sys.argv[1:]])]}
    started = time.perf_counter()
    try:
        _run(args, contenders, result)
    except SystemExit as ended:
        print(f"{ended}: what was measured until now is kept", flush=True)
        result["absent"]["the rest of this run"] = str(ended)
    result["samples"] = {workload: dict(rows) for workload, rows in result["samples"].items() if rows}
    result["seconds"] = time.perf_counter() - started
    result["versions"] = versions(args.peers)
    if args.onto:
        result = merged(json.loads(args.onto.read_text(encoding="utf-8")), result)
    _write(result, args.report)


def _run(args: argparse.Namespace, contenders: Sequence[Contender], result: dict[str, Any]) -> None:
    """Fills `result` as it goes."""
    samples, absent = result["samples"], result["absent"]
    if "quality" in args.work:
        result["quality"] = run_quality(contenders, args.threads, absent)
    if "start" in args.work:
        samples |= run_starts(contenders, args.rounds, args.threads, absent)
    if "memory" in args.work:
        samples["memory"] = run_memory(contenders, args.threads, absent)
    offline = [work for work in args.work if work in OFFLINE]
    if offline:
        workers = start_workers(contenders, args.threads, args.kv_tokens, absent)
        try:
            run_rounds(samples, contenders, workers, offline, args.rounds, args.threads, keep_slow=args.keep_slow, quiet_s=args.wait_quiet)
        finally:
            for worker in workers.values():
                worker.close()
    if "W6" in args.work:
        run_w6(samples.setdefault("W6", defaultdict(list)), contenders, args.rounds, args.threads, args.kv_tokens, absent, keep_slow=args.keep_slow, quiet_s=args.wait_quiet)


def prepared(contenders: Sequence[Contender], absent: dict[str, str]) -> list[Contender]:
    """Those whose environment and model are there now; the others are told once."""
    found = []
    for contender in contenders:
        try:
            contender.prepare()
            found.append(contender)
        except PeerAbsent as error:
            absent[contender.name] = str(error)
            print(f"absent: {contender.name}: {error}", flush=True)
    return found


def merged(earlier: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """An earlier run with what this one measured in its place."""
    kept = {key: earlier[key] | result[key] for key in ("samples", "absent", "versions")}
    quality = {**earlier.get("quality", {}), **result.get("quality", {})}
    return {**earlier, **result, **kept, "quality": quality, "commands": earlier["commands"] + result["commands"], "seconds": earlier["seconds"] + result["seconds"]}


def _write(result: dict[str, Any], is_report: bool) -> None:
    """The page on standard output and under build/peers; with --report into docs/benchmarks, with the samples and a plot."""
    if is_report:
        _write(result, False)  # for a later --onto
    folder = ROOT / "docs/benchmarks" if is_report else CACHE
    stem = f"{result['date']}-peers" if is_report else "last"
    has_plot = plot(result, folder / f"{stem}.png")
    text = markdown(result, f"{stem}.png" if has_plot else None)
    (folder / f"{stem}.md").write_text(text, encoding="utf-8")
    (folder / f"{stem}.json").write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    print("\n" + text)
    print(f"written: {(folder / stem).relative_to(ROOT)}.md")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=_names, default=list(PEERS), help=f"of {','.join(PEERS)} (default: all)")
    parser.add_argument("--precision", type=_names, default=list(PRECISIONS), help=f"of {','.join(PRECISIONS)} (default: all)")
    parser.add_argument("--work", type=_names, default=list(WORK), help=f"of {','.join(WORK)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every engine (default: all %(default)s cores)")
    parser.add_argument("--kv-tokens", type=int, default=65536, help="tokens of KV cache for every engine (default: %(default)s)")
    parser.add_argument("--keep-slow", action="store_true", help="ask contenders that are far behind in every round, too")
    parser.add_argument("--wait-quiet", type=float, default=5.0, metavar="SECONDS", help="wait that long for others to leave the cores (default: %(default)s)")
    parser.add_argument("--onto", type=Path, metavar="FILE", help="take what this run does not measure from an earlier one's JSON (build/peers/last.json)")
    parser.add_argument("--report", action="store_true", help="write docs/benchmarks/DATE-peers.md, with samples and a plot")
    args = parser.parse_args()
    for kind, given, known in (("peers", args.peers, PEERS), ("precision", args.precision, PRECISIONS), ("work", args.work, WORK)):
        if unknown := [each for each in given if each not in known]:
            parser.error(f"--{kind} has no `{unknown[0]}`; it is of {','.join(known)}")
    return args


if __name__ == "__main__":
    main()
