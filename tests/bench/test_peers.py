"""`make bench-peers`: its pure parts. Verdicts, quality, the conversion of the model, and the talk with a worker."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import quality, report
from benchmarks.peers.__main__ import merged, prepared
from benchmarks.peers.bars import BARS, judge, ours_of
from benchmarks.peers.contenders import CONTENDERS, PEERS, Contender, chosen
from benchmarks.peers.environments import PeerAbsent, run_logged
from benchmarks.peers.models import hf_name, unpermute
from benchmarks.peers.offline import figures, too_slow
from benchmarks.peers.session import Others, Worker, peak_mib, tree_of

_REQUIREMENTS = Path(report.__file__).parent / "requirements"


def _samples(workload: str, figure: str, **values: float) -> dict[str, Any]:
    return {workload: {name.replace("_", " ").replace("llama", "llama.cpp"): [{figure: value}] for name, value in values.items()}}


def _verdicts(samples: dict[str, Any], scores: dict[str, Any] | None = None) -> dict[tuple[str, str], str]:
    return {(v.precision, v.peer): v.said for v in judge(samples, scores)}


def test_a_rate_is_held_against_the_fastest_peer_of_its_precision() -> None:
    samples = {"W3": {
        "pagoda bf16": [{"out tok/s": 1700.0}], "openvino bf16": [{"out tok/s": 999.0}], "vllm bf16": [{"out tok/s": 700.0}],
        "openvino int8": [{"out tok/s": 5000.0}],
    }}  # fmt: skip
    assert _verdicts(samples) == {("bf16", "openvino bf16"): "met"}
    samples["W3"]["vllm bf16"] = [{"out tok/s": 1001.0}]
    assert _verdicts(samples) == {("bf16", "vllm bf16"): "**not met**"}


def test_medians_decide() -> None:
    runs = [{"wall s": 5.9}, {"wall s": 6.1}, {"wall s": 50.0}]
    samples = {"W4": {"pagoda bf16": runs, "openvino bf16": [{"wall s": 10.0}]}}
    assert _verdicts(samples) == {("bf16", "openvino bf16"): "**not met**"}
    samples["W4"]["pagoda bf16"] = [*runs, {"wall s": 5.0}, {"wall s": 5.0}]
    assert _verdicts(samples) == {("bf16", "openvino bf16"): "met"}


def test_decode_is_held_against_llama_bench_of_the_same_precision() -> None:
    samples = {"W1": {
        "pagoda bf16": [{"decode tok/s": 120.0}], "llama.cpp BF16": [{"decode tok/s": 500.0}],
        "llama-bench BF16": [{"decode tok/s": 100.0}], "llama-bench Q8_0": [{"decode tok/s": 300.0}],
    }}  # fmt: skip
    assert _verdicts(samples) == {("bf16", "llama-bench BF16"): "met"}
    samples["W1"]["llama-bench BF16"][0]["others"] = 0.5
    assert [v.others for v in judge(samples, None)] == [0.5]


@pytest.mark.parametrize(
    "ours, said", [(0.0014, "met"), (0.0016, "**not met**: KL divergence 1.60x llama.cpp Q8_0's"), (None, "open: quality was not scored")]
)
def test_a_precision_counts_only_with_its_quality(ours: float | None, said: str) -> None:
    samples = {"W6": {ours_of("8bit"): [{"req/s": 30.0}], "vllm bf16": [{"req/s": 10.0}]}}
    scores = {ours_of("8bit"): {"divergence": ours}, "llama.cpp Q8_0": {"divergence": 0.001}}
    assert _verdicts(samples, scores) == {("8bit", "vllm bf16"): said}


def test_bars_name_contenders_that_exist() -> None:
    names = [c.name for c in CONTENDERS]
    assert len(set(names)) == len(names)
    for bar in BARS:
        assert bar.against is None or bar.against == "llama-bench" or any(name.startswith(bar.against) for name in names)
    for precision in ("bf16", "8bit", "4bit"):
        assert ours_of(precision) in names


def test_every_peer_has_its_requirements_pinned() -> None:
    for name in (*PEERS, "openvino-export"):
        assert "==" in (_REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8")


def test_choosing() -> None:
    assert {c.peer for c in chosen(["openvino"], ["8bit"])} == {"openvino", "pagoda"}
    with pytest.raises(ValueError, match=r"no peer `ollama`; known: llama\.cpp, "):
        chosen(["ollama"], ["8bit"])


def test_other_numbers_of_tokens_are_no_result() -> None:
    answer = {"wall": 2.0, "first": 1.0, "counts": [3]}
    assert figures("W1", [([1, 2], 3)], answer) == {"wall s": 2.0, "out tok/s": 1.5, "decode tok/s": 2.0}
    with pytest.raises(RuntimeError, match="4 tokens were asked for"):
        figures("W1", [([1, 2], 4)], answer)


def test_only_peers_far_behind_their_own_precision_are_slow() -> None:
    found = {"openvino bf16": [{"wall s": 1.0}], "llama.cpp BF16": [{"wall s": 1.9}], "vllm bf16": [{"wall s": 1.7}], "pagoda bf16": [{"wall s": 9.0}]}
    assert too_slow([c for c in CONTENDERS if c.name in found], found) == ["llama.cpp BF16"]


def test_quality_of_the_reference_itself_and_of_another() -> None:
    rng = np.random.default_rng(0)
    logp_TV = quality._log_softmax(rng.standard_normal((5, 11), dtype=np.float32))
    assert np.allclose(np.exp(logp_TV).sum(axis=1), 1.0)
    targets = np.arange(5)
    same = quality.compare(quality._Said(logp_TV, [[1, 2, 3], [4]]), quality._Said(logp_TV, [[1, 2, 9], [4]]), targets)
    assert same.divergence == 0.0 and same.same_top == 1.0 and same.answers_equal == 0.5
    assert same.equal_until == pytest.approx((2 / 3 + 1) / 2)
    flat = np.full((5, 11), -np.log(11), np.float32)
    other = quality.compare(quality._Said(logp_TV, []), quality._Said(flat, []), targets)
    entropy = -(np.exp(logp_TV) * logp_TV).sum(axis=1)
    assert other.divergence == pytest.approx(float((np.log(11) - entropy).mean()), rel=1e-5)
    assert other.perplexity == pytest.approx(11.0, rel=1e-5) and other.answers_equal is None


def test_names_and_rows_of_a_gguf_file_are_hugging_faces() -> None:
    assert hf_name("blk.7.attn_output.weight") == "model.layers.7.self_attn.o_proj.weight"
    assert hf_name("token_embd.weight") == "model.embed_tokens.weight"
    halves = np.arange(2 * 6)[:, None]  # two heads of six rows: 0 1 2 are a head's first half
    interleaved = halves.reshape(2, 2, 3, 1).swapaxes(1, 2).reshape(12, 1)
    assert interleaved[:4, 0].tolist() == [0, 3, 1, 4]
    assert np.array_equal(unpermute(interleaved, 2), halves)


def test_a_report_says_what_was_met_and_who_was_absent() -> None:
    samples = _samples("W3", "out tok/s", pagoda_bf16=2000.0, openvino_bf16=1000.0)
    result = {
        "date": "2026-01-01", "commands": ["python -m benchmarks.peers"], "machine": "a machine", "versions": {"openvino": "1"}, "rounds": 5, "threads": 2,
        "seconds": 60.0, "samples": samples, "absent": {"vllm bf16": "no wheel"},
    }  # fmt: skip
    text = report.markdown(result, None)
    assert "| W3 | out tok/s | bf16 | 2000 | 1000 (openvino bf16) | >= 1.7x | 2.00x | 0.00 | met |" in text
    assert "1 of 1 met" in text and "- vllm bf16: no wheel" in text and "openvino 1. 5 interleaved" in text


def test_a_run_onto_an_earlier_one_replaces_what_it_measured() -> None:
    earlier = {"samples": {"W1": {"a": [1]}, "W3": {"a": [1]}}, "absent": {}, "versions": {}, "quality": {"a": {}}, "commands": ["x"], "seconds": 1.0}
    later = {"samples": {"W3": {"a": [2]}}, "absent": {"b": "why"}, "versions": {}, "commands": ["y"], "seconds": 2.0}
    found = merged(earlier, later)
    assert found["samples"] == {"W1": {"a": [1]}, "W3": {"a": [2]}} and found["quality"] == {"a": {}}
    assert found["commands"] == ["x", "y"] and found["seconds"] == 3.0 and found["absent"] == {"b": "why"}


_ECHO = """
import argparse
from benchmarks.peers.workers.wire import Generated, serve
class Echo:
    def __init__(self, args): self.last = args.options["last"]
    def generate(self, requests, *, ignore_eos=True):
        print("a library's chatter")
        return Generated([[self.last] * wanted for _, wanted in requests])
serve(Echo)
"""


def test_a_worker_answers_is_paused_and_ends(tmp_path: Path) -> None:
    words = [sys.executable, "-c", _ECHO, "--model", "none", "--option=last=7"]
    worker = Worker("echo", words, dict(os.environ), tmp_path / "log", timeout=60.0)
    worker.pause()
    worker.resume()
    assert worker.ask({"do": "answers", "requests": [[[1], 2]]}) == {"tokens": [[7, 7]]}
    assert worker.ask({"do": "generate", "requests": [[[1], 3]]})["counts"] == [3]
    assert worker.peak_mib() > 1.0
    worker.close()
    assert "chatter" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_worker_that_cannot_start_is_absent_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(PeerAbsent, match=r"echo ended: .*there is no such engine"):
        Worker("echo", [sys.executable, "-c", "raise SystemExit('there is no such engine')"], dict(os.environ), tmp_path / "log", timeout=60.0)


def test_a_peer_that_cannot_be_had_is_told_with_the_reason(tmp_path: Path) -> None:
    def missing() -> Path:
        run_logged([sys.executable, "-c", "raise SystemExit('no matching distribution')"], tmp_path / "log")
        return tmp_path

    absent: dict[str, str] = {}
    there = Contender("pagoda", "4bit", "there", lambda: tmp_path)
    assert prepared([Contender("pagoda", "4bit", "gone", missing), there], absent) == [there]
    assert list(absent) == ["pagoda gone"] and "ended with status 1: no matching distribution" in absent["pagoda gone"]


def test_our_own_work_is_not_counted_as_others() -> None:
    assert os.getpid() in tree_of(os.getpid()) and peak_mib(os.getpid()) > 1.0
    assert Others().cores() >= 0.0
