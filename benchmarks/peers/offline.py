"""W1 to W5, in process: every workload goes from contender to contender, round after round, one at a time.

Before each measurement the contender answers a tiny request, so that what the others left in the caches does not count.
A contender more than `SLOW` times behind the fastest peer of its precision in its first round has no part in a bar and
is not asked again on that workload: its figure stands with the number of runs it had.
"""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.contenders import Contender
from benchmarks.peers.environments import CACHE, PeerAbsent, llama_program
from benchmarks.peers.session import Others, Worker, wait_quiet
from benchmarks.workloads import ids, requests

__all__ = ["LLAMA_BENCH", "SLOW", "Sample", "Samples", "figures", "log_of", "run_rounds", "start_workers", "too_slow"]

SLOW = 1.8
LLAMA_BENCH = "llama-bench"
_MAX_LEN = 2304

Sample = dict[str, float]
Samples = dict[str, dict[str, list[Sample]]]  # workload -> contender -> runs


def start_workers(contenders: Sequence[Contender], num_threads: int, kv_tokens: int, absent: dict[str, str]) -> dict[str, Worker]:
    """A paused worker for each that can be started; the reason for the others goes to `absent`."""
    workers = {}
    for contender in contenders:
        try:
            words, env = contender.command(num_threads, kv_tokens), contender.environment(num_threads, kv_tokens)
            worker = Worker(contender.name, words, env, log_of(contender))
            worker.ask({"do": "generate", "requests": [(ids(16, 5), 4), (ids(16, 6), 4)]})
        except (PeerAbsent, RuntimeError) as error:
            absent[contender.name] = str(error)
            print(f"absent: {contender.name}: {error}", flush=True)
            continue
        worker.pause()
        workers[contender.name] = worker
        print(f"started {contender.name}", flush=True)
    return workers


def log_of(contender: Contender, what: str = "worker") -> Path:
    return CACHE / f"logs/{contender.name.replace(' ', '-').replace(',', '')}-{what}.log"


def run_rounds(
    samples: Samples, contenders: Sequence[Contender], workers: dict[str, Worker], workloads: Sequence[str], rounds: int, num_threads: int,
    *, keep_slow: bool, quiet_s: float,
) -> None:
    """Fills `samples`, by workload and contender's name. A worker that fails is told and left out from then on."""
    samples.update({workload: defaultdict(list) for workload in workloads})
    slow: set[tuple[str, str]] = set()
    for round in range(rounds):
        for workload in workloads:
            todo = [c for c in contenders if c.name in workers and workload not in c.skips and (workload, c.name) not in slow]
            for contender in todo[round % max(len(todo), 1) :] + todo[: round % max(len(todo), 1)]:
                wait_quiet(quiet_s)
                _measure(contender, workers, workload, round, samples)
            if workload == "W1":
                wait_quiet(quiet_s)
                _run_llama_bench(contenders, round, num_threads, samples)
            if round == 0 and not keep_slow:
                slow |= {(workload, name) for name in too_slow(todo, samples[workload])}


def _measure(contender: Contender, workers: dict[str, Worker], workload: str, round: int, samples: Samples) -> None:
    worker, todo = workers[contender.name], requests(workload, round)
    worker.resume()
    try:
        worker.ask({"do": "generate", "requests": [(ids(16, 11 + round), 4)]})
        others = Others()
        answer = worker.ask({"do": "generate", "requests": todo})
        cores = others.cores()
        worker.pause()
    except (RuntimeError, OSError) as error:
        print(f"round {round} {workload} {contender.name}: failed: {error}", flush=True)
        workers.pop(contender.name).close()
        return
    found = figures(workload, todo, answer) | {"others": cores}
    samples[workload][contender.name].append(found)
    print(f"round {round} {workload:8s}{contender.name:32s} {_shown(found)}", flush=True)


def figures(workload: str, todo: Sequence[tuple[list[int], int]], answer: dict[str, object]) -> Sample:
    """Rates of one run. RuntimeError when the engine gave other numbers of tokens than asked for."""
    wanted = [count for _, count in todo]
    if answer["counts"] != wanted:
        raise RuntimeError(f"{sum(wanted)} tokens were asked for in {len(wanted)} answers, and {answer['counts']} came")
    wall, tokens = float(str(answer["wall"])), sum(wanted)
    found = {"wall s": wall, "out tok/s": tokens / wall}
    if workload == "W1" and answer["first"] is not None:
        found["decode tok/s"] = (tokens - 1) / (wall - float(str(answer["first"])))
    if workload.startswith("W2"):
        found["prefill tok/s"] = len(todo[0][0]) / wall
    return found


def too_slow(contenders: Sequence[Contender], found: dict[str, list[Sample]]) -> list[str]:
    """Peers far behind the fastest peer of their precision in its first run."""
    slow = []
    for precision in {c.precision for c in contenders}:
        walls = {c.name: found[c.name][0]["wall s"] for c in contenders if c.precision == precision and not c.is_ours and found.get(c.name)}
        slow += [name for name, wall in walls.items() if wall > SLOW * min(walls.values())]
    return slow


def _run_llama_bench(contenders: Sequence[Contender], round: int, num_threads: int, samples: Samples) -> None:
    """Decode alone, from an empty context, as llama.cpp itself measures it; the better of one thread and all."""
    for contender in (c for c in contenders if c.peer == "llama.cpp" and llama_program(LLAMA_BENCH).is_file()):
        threads = ",".join(map(str, sorted({1, num_threads})))
        options = ["-m", str(contender.model()), "-t", threads, "-p", "0", "-n", "128", "-r", "1", "-fa", "1", "-o", "json"]
        others = Others()
        done = subprocess.run([str(llama_program(LLAMA_BENCH)), *options], capture_output=True, text=True)
        if done.returncode:
            print(f"round {round} {LLAMA_BENCH} {contender.form}: failed: {done.stderr[-200:]}", flush=True)
            continue
        best = max(json.loads(done.stdout), key=lambda row: row["avg_ts"])
        found = {"decode tok/s": best["avg_ts"], "threads": best["n_threads"], "others": others.cores()}
        samples["W1"][f"{LLAMA_BENCH} {contender.form}"].append(found)
        print(f"round {round} W1      {LLAMA_BENCH + ' ' + contender.form:32s} {_shown(found)}", flush=True)


def _shown(found: Sample) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in found.items())
