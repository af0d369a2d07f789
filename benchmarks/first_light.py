"""First light: the default model against transformers, on this machine, in one run.

    python benchmarks/first_light.py

Three figures: decode speed with one stream over that of `transformers` generate in bfloat16 (wanted: 3), output of 32
streams over what transformers gives one (wanted: 10), and seconds from launching a process to its first token (wanted:
below 1.5). Both engines hold the same weights: ours the quantized file, transformers the same file dequantized. Each
runs in a process of its own and they take turns, round by round, so that a slow minute of the machine falls on both;
the figures are medians. Needs torch and transformers (`make setup`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from pagoda.base.config import EngineConfig, ModelConfig
from pagoda.base.hardware import read_hardware
from pagoda.bench import startup
from pagoda.bench.passage import PASSAGE
from pagoda.bench.report import Report, Row, Spread
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

WANTED_ONE, WANTED_MANY, WANTED_SECONDS = 3.0, 10.0, 1.5
NUM_STREAMS = 32
QUIET_CORES = 0.2  # torch loses many times its speed when something else wants its cores


def main() -> int:
    """0 when all three figures are reached, 1 when not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--launches", type=int, default=5, help="fresh processes for the start-up figure (default: %(default)s)")
    parser.add_argument("--output-json", type=Path, help="also write the figures there")
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return _serve_role(args.role)
    report = _measure(args)
    report.show()
    if args.output_json:
        report.write(args.output_json)
    return 0 if report.is_ok else 1


def _measure(args: argparse.Namespace) -> Report:
    busy = _busy_cores()
    tokenizer = load_tokenizer(_default_path())
    prompts = _prompts(tokenizer, args.input_len)
    runs: dict[str, list[dict[str, Any]]] = {"transformers": [], "one": [], "many": []}
    theirs, ours = _Worker("transformers"), _Worker("pagoda")
    try:
        for i in range(args.rounds + 1):  # the first round warms up
            done = {
                "transformers": theirs.ask(prompts[:1], args.output_len),
                "one": ours.ask(prompts[:1], args.output_len),
                "many": ours.ask(prompts, args.output_len),
            }
            line = ", ".join(f"{name} {found['decode_rate']:.1f}" for name, found in done.items())
            print(f"round {i}{' (warm-up)' if i == 0 else ''}: decode tok/s: {line}", file=sys.stderr, flush=True)
            if i:
                for name, found in done.items():
                    runs[name].append(found)
    finally:
        theirs.close()
        ours.close()
    launch = startup.measure(startup.Options(num_iters=args.launches), EngineConfig())
    return _report(args, runs, launch, busy)


def _report(args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], launch: Report, busy: float) -> Report:
    def median(name: str, figure: str) -> float:
        return Spread([run[figure] for run in runs[name]]).at(50)

    one = median("one", "decode_rate") / median("transformers", "decode_rate")
    many = median("many", "output_rate") / median("transformers", "output_rate")
    data = launch.data()
    seconds = float(data["median_complete_first_token_s"])
    reached = (one >= WANTED_ONE, many >= WANTED_MANY, seconds < WANTED_SECONDS)
    rows = [
        Row("transformers_decode", "transformers bf16, 1 stream, decode", median("transformers", "decode_rate"), "tok/s"),
        Row("pagoda_decode", "pagoda, 1 stream, decode", median("one", "decode_rate"), "tok/s"),
        Row("transformers_output", "transformers bf16, 1 stream, whole", median("transformers", "output_rate"), "tok/s"),
        Row("pagoda_output_one", "pagoda, 1 stream, whole", median("one", "output_rate"), "tok/s"),
        Row("pagoda_output_many", f"pagoda, {NUM_STREAMS} streams, whole", median("many", "output_rate"), "tok/s"),
        Row("serve_first_token", "pagoda serve, launch to first token", float(data["median_serve_first_token_s"]), "s"),
        Row("ratio_one", "1: one stream against transformers", one, f"x   (wanted: {WANTED_ONE:g}{_mark(reached[0])})"),
        Row("ratio_many", f"2: {NUM_STREAMS} streams against its one", many, f"x   (wanted: {WANTED_MANY:g}{_mark(reached[1])})"),
        Row("first_token", "3: launch to first token", seconds, f"s   (wanted: below {WANTED_SECONDS:g}{_mark(reached[2])})"),
    ]
    same = _same_tokens(runs["transformers"][0]["tokens"][0], runs["one"][0]["tokens"][0])
    notes = [
        f"torch {version('torch')}, transformers {version('transformers')}, {read_hardware().num_cores} threads each",
        f"the two greedy answers begin with the same {same} of {args.output_len} tokens",
    ]
    if busy > QUIET_CORES:
        notes.append(f"others used {busy:.1f} cores before the start: these figures compare nothing; repeat them when the machine is quiet")
    options = {key: value for key, value in vars(args).items() if key not in ("role", "output_json")}
    title = f"First light: {args.input_len} + {args.output_len} tokens, medians of {args.rounds} interleaved rounds"
    detail = {"busy_cores_before": busy, "runs": {name: [{**run, "tokens": None} for run in found] for name, found in runs.items()}, "launch": data}
    return Report(title, rows, options, detail, notes, is_ok=all(reached))


def _mark(is_reached: bool) -> str:
    return "" if is_reached else ", MISSED"


def _same_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _busy_cores(seconds: float = 2.0) -> float:
    """Cores' worth of time that anything on this machine used just now; 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0

    def busy() -> float:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / seconds


def _default_path() -> Path:
    from pagoda.executor.launch import describe_model

    return describe_model(EngineConfig())[0].path


def _prompts(tokenizer: Tokenizer, num_tokens: int) -> list[list[int]]:
    """One prompt per stream, each from another place of a real text."""
    ids = tokenizer.encode(PASSAGE, add_special_tokens=False)
    ids = ids * (1 + (num_tokens + NUM_STREAMS * 16) // len(ids))
    return [ids[16 * i : 16 * i + num_tokens] for i in range(NUM_STREAMS)]


class _Worker:
    """An engine in a process of its own, which computes only when it is asked."""

    def __init__(self, role: str) -> None:
        words = [sys.executable, __file__, "--role", role]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask(self, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        """Greedy answers of exactly `output_len` tokens."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "output_len": output_len}) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"a worker ended with status {self._process.wait()}")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


class _Engine(Protocol):
    def run(self, prompts: list[list[int]], output_len: int) -> tuple[float, float, list[list[int]]]:
        """-> when every stream had its first token, when the last token came (time.perf_counter or alike), tokens."""


def _serve_role(role: str) -> int:
    engine: _Engine = ROLES[role]()
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        first, last, tokens = engine.run(asked["prompts"], asked["output_len"])
        seconds = time.perf_counter() - started
        num = sum(len(ids) for ids in tokens)
        found = {
            "seconds": seconds,
            "decode_rate": (num - len(tokens)) / (last - first),
            "output_rate": num / seconds,
            "tokens": tokens,
        }
        print(json.dumps(found), flush=True)
    return 0


class _Pagoda:
    def __init__(self) -> None:
        from pagoda import LLM

        self._llm = LLM(enable_prefix_caching=False)  # the rounds repeat their prompts

    def run(self, prompts: list[list[int]], output_len: int) -> tuple[float, float, list[list[int]]]:
        from pagoda import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        times = [output.metrics for output in outputs if output.metrics is not None]
        first, last = max(t.first_token_time for t in times), max(t.last_token_time for t in times)
        return first, last, [output.outputs[0].token_ids for output in outputs]


class _Transformers:
    """The default model's file, read by our own loader, dequantized, as bfloat16."""

    def __init__(self) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_num_threads(read_hardware().num_cores)
        state, values = _dequantized()
        left_out = ("architectures", "torch_dtype", "rope_theta", "rope_scaling")
        rope = {"rope_type": "default", "rope_theta": values["rope_theta"]}
        config = LlamaConfig(**{key: value for key, value in values.items() if key not in left_out}, rope_parameters=rope)
        model = LlamaForCausalLM(config)
        missing, unknown = model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=False)
        assert not unknown and set(missing) <= {"lm_head.weight"}, f"weights do not fit: {missing}, {unknown}"
        model.tie_weights()
        self._torch, self._model = torch, model.bfloat16().eval()

    def run(self, prompts: list[list[int]], output_len: int) -> tuple[float, float, list[list[int]]]:
        times: list[float] = []

        def note(*_: Any, **__: Any) -> Any:
            times.append(time.perf_counter())
            return self._torch.zeros(len(prompts), dtype=self._torch.bool)

        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            answer = self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), do_sample=False, max_new_tokens=output_len,
                eos_token_id=None, pad_token_id=0, stopping_criteria=[note],
            )  # fmt: skip
        return times[0], times[-1], answer[:, ids.shape[1] :].tolist()


def _dequantized() -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors by Hugging Face's names, and the config."""
    from pagoda.executor.launch import describe_model
    from pagoda.loader.names import HF_DECODER
    from pagoda.loader.tensor import SourceTensor
    from pagoda.models import gguf

    source = describe_model(EngineConfig(model=ModelConfig()))[0]
    file = source.gguf_file
    assert file is not None
    reorder = gguf.row_order(file, source.spec) or (lambda _, tensor: tensor)
    theirs = {ours: name for name, ours in HF_DECODER.items() if ours is not None}
    found = {}
    for name, info in file.tensors.items():
        ours = source.names(name)
        if ours is None:
            continue
        is_plain = info.dtype in ("F32", "F16", "BF16")
        tensor = SourceTensor(name, file.array(name) if is_plain else file.raw(name), tuple(info.shape), None if is_plain else info.dtype)
        stem, _, kind = ours.rpartition(".")
        parts = stem.split(".")
        layer = parts[1] if parts[0] == "layers" else ""
        pattern = stem.replace(f"layers.{layer}.", "layers.{i}.", 1) if layer else stem
        found[f"{theirs[pattern].replace('{i}', layer)}.{kind}"] = reorder(ours, tensor).as_float32().copy()
    return found, source.hf_config


ROLES: dict[str, Any] = {"pagoda": _Pagoda, "transformers": _Transformers}

if __name__ == "__main__":
    sys.exit(main())
