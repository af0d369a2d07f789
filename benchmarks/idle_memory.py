"""Memory of an idle server, and how it grows as it serves: `python benchmarks/idle_memory.py`.

The server is asked nothing, then gets rounds of W6 (16 streaming clients, 64 requests each). Figures are of all its processes
together: resident bytes with shared pages counted once (PSS), after it has been idle for a moment. The cache of keys and values
is touched only where it has been written, so the first rounds grow into it; after that nothing may grow.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time

import psutil
from workloads import run_server

from pagoda.base.config import config_from_kwargs
from pagoda.bench.server_process import running_server

SETTLE_SECONDS = 2.0


def family() -> list[psutil.Process]:
    """The server's processes: all there are below this one."""
    return psutil.Process(os.getpid()).children(recursive=True)


def memory() -> tuple[float, float, float]:
    """(MiB of all processes, threads, open files) once the server is idle."""
    time.sleep(SETTLE_SECONDS)
    found = family()
    return sum(p.memory_full_info().pss for p in found) / 2**20, sum(p.num_threads() for p in found), sum(p.num_fds() for p in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 30)
    args = parser.parse_args()
    config = config_from_kwargs(args.model, kv_cache_memory_bytes=args.kv_cache_memory_bytes, max_model_len=4096)
    with running_server(config) as server:
        print("| after | MiB | threads | open files |\n|---|---|---|---|")
        print("| start, nothing asked | {:.0f} | {} | {} |".format(*memory()), flush=True)
        for round in range(args.rounds):
            asyncio.run(run_server(server.base_url, round))
            print("| {} requests | {:.0f} | {} | {} |".format(64 * (round + 1), *memory()), flush=True)
        time.sleep(10)
        print("| ten idle seconds | {:.0f} | {} | {} |".format(*memory()), flush=True)


if __name__ == "__main__":
    main()
