"""The forward of a device: decoding captured once per batch size and replayed, anything else started op by op.

    sizes   1, 2, 4, 8, 16, 24, ... 256, 272, 288, ... up to max_num_seqs, which is always one of them

A batch takes the smallest graph that holds it; rows beyond it are padding, which writes no key and which nobody reads. The
largest is captured first, so that all share its memory, and whatever the time allowed does not suffice for, the next larger
one stands in for. A graph ends at the logits: sampling depends on what requests ask for, and is started behind it. All of them
leave their logits in one array: each graph's own would be held for good, a gigabyte with 256 sequences and 128,000 tokens.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from pagoda.base.clock import Clock
from pagoda.kernels.triton.plane import DevicePlane
from pagoda.models.decoder import Model
from pagoda.worker.device import Device
from pagoda.worker.device_state import Inputs

__all__ = ["DeviceForward", "graph_sizes"]

Array = Any


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending; the largest holds any decoding batch."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, max_num_seqs, 16)]
    return [*(size for size in sizes if size < max_num_seqs), max_num_seqs]


class DeviceForward:
    """From inputs to logits. `planes` are captured by address."""

    def __init__(self, device: Device, model: Model, inputs: Inputs, planes: tuple[DevicePlane, ...]) -> None:
        self._device, self._model, self._inputs, self._planes = device, model, inputs, planes
        self._graphs: dict[int, Callable[[], Array]] = {}
        self._sizes: list[int] = []
        self.num_replays = 0
        self.name, self.why = "op by op", "no graph was captured"
        self.graphs_nbytes, self.graphs_seconds = 0, 0.0
        self._logits_RV: Array = None  # of the last graph replayed

    def capture(self, sizes: list[int], *, seconds: float, clock: Clock = time.perf_counter) -> None:
        """Captures as many of the sizes as `seconds` allow, the largest first, that one always."""
        started, before = clock(), self._device.memory()
        for size in sorted(sizes, reverse=True):
            if self._graphs and clock() - started > seconds:
                break
            self._graphs[size] = self._device.capture(lambda size=size: self._run_for_graph(size))  # type: ignore[misc]
        self._sizes = sorted(self._graphs)
        self.graphs_seconds = clock() - started
        self.graphs_nbytes = max(0, before.free - self._device.memory().free)
        missing = len(sizes) - len(self._sizes)
        self.name = "graphs"
        self.why = f"{len(self._sizes)} sizes from {self._sizes[0]} to {self._sizes[-1]} in {self.graphs_seconds:.1f} s"
        if missing:
            self.why += f"; {missing} smaller ones had no time left (--graph-capture-seconds), the next larger stand in"

    def graph_for(self, num_seqs: int) -> int:
        """The size of the graph that a decoding batch of so many sequences takes, or 0."""
        place = bisect_left(self._sizes, num_seqs)
        return self._sizes[place] if place < len(self._sizes) else 0

    def replay(self, size: int) -> Array:
        """-> logits of `size` rows, valid until the next replay of any graph."""
        self.num_replays += 1
        return self._graphs[size]()

    def _run_for_graph(self, size: int) -> Array:
        """The array is made when the largest runs for the first time, before anything is captured."""
        logits_RV = self.run(size, size, size)
        if self._logits_RV is None or len(self._logits_RV) < size:
            self._logits_RV = logits_RV.clone()
        else:
            self._logits_RV[:size].copy_(logits_RV)
        return self._logits_RV[:size]

    def run(self, num_tokens: int, num_seqs: int, num_rows: int) -> Array:
        """Op by op -> logits, None without rows."""
        batch = self._inputs.batch(num_tokens, num_seqs, num_rows, self._planes)
        hidden_RD = self._model.forward(batch)
        return self._model.logits(hidden_RD) if num_rows else None
