"""What is asked of Pagoda beside its peers, as rows, and the verdict on each from the samples of one run.

A ratio is ours against the peer's: of rates at least so much, of times and sizes at most so much. The peer is the fastest
of the same precision, unless the row names one. A precision whose answers are too far from float32 meets no bar, and
one whose answers were not scored leaves it open.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.contenders import CONTENDERS, Contender
from benchmarks.peers.offline import LLAMA_BENCH, Sample

__all__ = ["BARS", "MAX_DIVERGENCE_RATIO", "QUALITY_PEER", "Bar", "Verdict", "judge", "medians_of", "ours_of", "quality_ratio"]

MAX_DIVERGENCE_RATIO = 1.5
QUALITY_PEER = {"8bit": "llama.cpp Q8_0", "4bit": "llama.cpp Q4_1"}


@dataclass(frozen=True)
class Bar:
    workload: str
    figure: str
    wanted: Mapping[str, float]  # precision -> ratio
    against: str | None = None  # the start of a contender's name; None: the fastest peer of the precision
    is_rate: bool = True


@dataclass(frozen=True)
class Verdict:
    bar: Bar
    precision: str
    ours: float
    theirs: float
    peer: str
    others: float = 0.0  # cores that others kept busy: the median of our runs or of the peer's, whichever is more
    quality: float | None = None  # our KL divergence over the peer's at the same precision; None: not scored in this run

    @property
    def wanted(self) -> float:
        return self.bar.wanted[self.precision]

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    @property
    def said(self) -> str:
        """`met`, or what keeps it from that."""
        if not (self.ratio >= self.wanted if self.bar.is_rate else self.ratio <= self.wanted):
            return "**not met**"
        if self.quality is None and self.precision in QUALITY_PEER:
            return "open: quality was not scored"
        if (self.quality or 0.0) > MAX_DIVERGENCE_RATIO:
            return f"**not met**: KL divergence {self.quality:.2f}x {QUALITY_PEER[self.precision]}'s"
        return "met"


_VLLM = "vllm bf16"
BARS = (
    Bar("W1", "decode tok/s", {"bf16": 1.1, "8bit": 1.5, "4bit": 1.5}, LLAMA_BENCH),
    Bar("W1", "out tok/s", {"bf16": 1.2, "8bit": 1.6, "4bit": 1.8}),
    Bar("W2-512", "prefill tok/s", {"bf16": 1.1, "8bit": 1.6, "4bit": 1.5}),
    Bar("W2-2048", "prefill tok/s", {"bf16": 1.1, "8bit": 1.6, "4bit": 1.5}),
    Bar("W3", "out tok/s", {"bf16": 1.7, "8bit": 2.5, "4bit": 2.5}),
    Bar("W4", "wall s", {"bf16": 0.6, "8bit": 0.42, "4bit": 0.42}, is_rate=False),
    Bar("W5", "wall s", {"bf16": 0.7, "8bit": 0.55, "4bit": 0.55}, _VLLM, is_rate=False),
    Bar("W6", "req/s", {"bf16": 1.8, "8bit": 2.5, "4bit": 2.5}, _VLLM),
    Bar("W6", "ITL p99 ms", {"8bit": 0.5, "4bit": 0.5}, _VLLM, is_rate=False),
    Bar("memory", "peak MiB", {"8bit": 1.3}, "llama.cpp", is_rate=False),
)


def medians_of(samples: Mapping[str, Mapping[str, Sequence[Sample]]], workload: str, figure: str) -> dict[str, float]:
    """Contender's name -> median, of those that have the figure."""
    runs = {name: [run[figure] for run in found if figure in run] for name, found in samples.get(workload, {}).items()}
    return {name: statistics.median(values) for name, values in runs.items() if values}


def judge(
    samples: Mapping[str, Mapping[str, Sequence[Sample]]], quality: Mapping[str, Mapping[str, float | None]] | None
) -> list[Verdict]:
    """A verdict for each bar that both sides were measured for."""
    verdicts = []
    for bar in BARS:
        medians, busy = (medians_of(samples, bar.workload, figure) for figure in (bar.figure, "others"))
        for precision in bar.wanted:
            ours, ratio = ours_of(precision), quality_ratio(precision, quality)
            peers = {name: medians[name] for name in _rivals(bar, precision, medians)}
            if ours in medians and peers:
                peer = (max if bar.is_rate else min)(peers, key=lambda name: peers[name])
                verdicts.append(Verdict(bar, precision, medians[ours], peers[peer], peer, max(busy.get(ours, 0.0), busy.get(peer, 0.0)), ratio))
    return verdicts


def quality_ratio(precision: str, quality: Mapping[str, Mapping[str, float | None]] | None) -> float | None:
    """Our KL divergence over llama.cpp's at this precision; None where one is unknown or none is asked for."""
    if not quality or precision not in QUALITY_PEER:
        return None
    mine, theirs = (quality.get(name, {}).get("divergence") for name in (ours_of(precision), QUALITY_PEER[precision]))
    return None if mine is None or theirs is None else mine / theirs


def ours_of(precision: str) -> str:
    """The row of ours that the bars are held against."""
    return next(c.name for c in CONTENDERS if c.is_ours and c.is_main and c.precision == precision)


def _rivals(bar: Bar, precision: str, medians: Mapping[str, float]) -> Iterable[str]:
    by_name: dict[str, Contender] = {c.name: c for c in CONTENDERS}
    for name in medians:
        peer = by_name.get(name)
        if bar.against == _VLLM:
            is_rival = name == _VLLM
        elif bar.against == LLAMA_BENCH:
            forms = {c.form for c in CONTENDERS if c.peer == "llama.cpp" and c.precision == precision}
            is_rival = name.startswith(LLAMA_BENCH) and name.removeprefix(LLAMA_BENCH).strip() in forms
        else:
            is_rival = peer is not None and not peer.is_ours and peer.precision == precision and name.startswith(bar.against or "")
        if is_rival:
            yield name
