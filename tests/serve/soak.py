"""Hundreds of streams whose readers leave when they like: `python -m tests.serve.soak --streams 500 --seconds 120`.

The whole server, its engine process included, over the toy worker. Afterwards nothing may be left: no request, no KV block, no file
descriptor of either process; and memory must be flat: it is measured eight times, and the second half of the run may not add more
than _FLAT_MIB to what the first half needed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import time
from dataclasses import dataclass, field

import httpx
import psutil

from tests.serve.test_server_process import TEXT, toy

_SETTLE_SECONDS = 10.0


@dataclass
class Report:
    finished: int = 0
    left: int = 0
    problems: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)  # of both processes, at the start, after each eighth, and at the end

    @property
    def grown_mib(self) -> float:
        """In the second half of the run."""
        return self.memory_mib[-1] - self.memory_mib[len(self.memory_mib) // 2]

    @property
    def is_good(self) -> bool:
        return not self.problems and not self.leaks and self.finished > 0 and self.left > 0


async def _reader(host: str, port: int, number: int, until: float, report: Report) -> None:
    rng = random.Random(number)
    while time.monotonic() < until:
        num_tokens, leaves_after = rng.randint(1, 100), rng.randint(1, 150)
        body = {"prompt": f"{number} " * rng.randint(1, 10), "max_tokens": num_tokens, "ignore_eos": True, "stream": rng.random() < 0.9, "seed": number}
        raw = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        seen = b""
        try:
            while (chunk := await reader.read(4096)) and seen.count(b"data: {") < leaves_after:
                seen += chunk
            if not chunk:
                _judge(seen, body, report)
            else:
                report.left += 1
        finally:
            writer.close()


def _judge(seen: bytes, body: dict[str, object], report: Report) -> None:
    if not seen.startswith(b"HTTP/1.1 200"):
        report.problems.append(seen[:200].decode("ascii", "replace"))
    elif body["stream"] and (seen.count(b'"finish_reason":"length"') != 1 or b"data: [DONE]" not in seen):
        report.problems.append(f"no end, or more than one: {seen[-300:]!r}")
    else:
        report.finished += 1


def _figure(text: str, name: str) -> float:
    found = re.search(rf"^{name}{{.*?}} (\S+)$", text, re.MULTILINE)
    assert found, name
    return float(found[1])


def _state(processes: list[psutil.Process]) -> tuple[int, float]:
    """File descriptors and MiB of resident memory."""
    return sum(process.num_fds() for process in processes), sum(process.memory_info().rss for process in processes) / 2**20


async def _run(url: str, processes: list[psutil.Process], streams: int, seconds: float, report: Report) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    async with httpx.AsyncClient(base_url=url) as http:
        await http.get("/metrics")
        num_fds, begun = _state(processes)
        until = time.monotonic() + seconds
        readers = [asyncio.create_task(_reader(host, int(port), number, until, report)) for number in range(streams)]
        report.memory_mib.append(begun)
        for _ in range(8):
            await asyncio.sleep(seconds / 8)
            report.memory_mib.append(_state(processes)[1])
        done, _ = await asyncio.wait(readers, timeout=seconds + 60)
        report.problems += [repr(task.exception()) for task in done if task.exception() is not None]
        report.problems += ["readers never ended"] * (len(done) < len(readers))
        report.leaks = ["nothing was looked at"]
        end = time.monotonic() + _SETTLE_SECONDS
        while report.leaks and time.monotonic() < end:
            await asyncio.sleep(0.2)
            text = (await http.get("/metrics")).text
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "pagoda:server_load")
            report.leaks = [f"{name} is {value}" for name in names if (value := _figure(text, name))]
            now, memory = _state(processes)
            report.leaks += [f"{now - num_fds} file descriptors more"] if now > num_fds else []
        report.memory_mib.append(memory)


def run(streams: int, seconds: float) -> Report:
    report = Report()
    with toy("") as server:
        url = server.url
        parent = psutil.Process(server.process.pid)
        asyncio.run(_run(url, [parent, *parent.children(recursive=True)], streams, seconds, report))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    report = run(options.streams, options.seconds)
    print(f"{report.finished} answers whole, {report.left} left early")
    print(f"memory: {' '.join(f'{mib:.1f}' for mib in report.memory_mib)} MiB, {report.grown_mib:+.1f} in the second half")
    for line in (*report.problems[:10], *report.leaks):
        print(line)
    raise SystemExit(0 if report.is_good else 1)


if __name__ == "__main__":
    main()
