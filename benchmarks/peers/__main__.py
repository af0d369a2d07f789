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
from typing import Any

from benchmarks.peers.contenders import PEERS, PRECISIONS, chosen
from benchmarks.peers.environments import CACHE
from benchmarks.peers.offline import run_rounds, start_workers
from benchmarks.peers.quality import run_quality
from benchmarks.peers.servers import run_memory, run_starts, run_w6

OFFLINE = ("W1", "W2-512", "W2-2048", "W3", "W4", "W5")
WORK = ("quality", "start", "memory", *OFFLINE, "W6")
_START_ROUNDS = 3


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # so that no engine stays behind
    contenders = chosen(args.peers, args.precision)
    absent: dict[str, str] = {}
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "rounds": args.rounds, "absent": absent, "samples": {}}
    samples, started = result["samples"], time.perf_counter()
    if "quality" in args.work:
        result["quality"] = run_quality(contenders, args.threads, absent)
    if "start" in args.work:
        samples |= run_starts(contenders, min(args.rounds, _START_ROUNDS), args.threads, absent)
    if "memory" in args.work:
        samples["memory"] = run_memory(contenders, args.threads, absent)
    offline = [work for work in args.work if work in OFFLINE]
    if offline:
        workers = start_workers(contenders, args.threads, args.kv_tokens, absent)
        try:
            samples |= run_rounds(contenders, workers, offline, args.rounds, args.threads, keep_slow=args.keep_slow)
        finally:
            for worker in workers.values():
                worker.close()
    if "W6" in args.work:
        samples["W6"] = run_w6(contenders, args.rounds, args.threads, args.kv_tokens, absent)
    result["seconds"] = time.perf_counter() - started
    (CACHE / "last.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"type": lambda text: [part for part in text.split(",") if part]}
    parser.add_argument("--peers", **names, default=list(PEERS), help=f"of {','.join(PEERS)} (default: all)")
    parser.add_argument("--precision", **names, default=list(PRECISIONS), help=f"of {','.join(PRECISIONS)} (default: all)")
    parser.add_argument("--work", **names, default=list(WORK), help=f"of {','.join(WORK)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every engine (default: all %(default)s cores)")
    parser.add_argument("--kv-tokens", type=int, default=65536, help="tokens of KV cache for every engine (default: %(default)s)")
    parser.add_argument("--keep-slow", action="store_true", help="ask contenders that are far behind in every round, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
