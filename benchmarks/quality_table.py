"""What each weight format and activation precision costs in answers, on the default model, as a table.

    python benchmarks/quality_table.py --output docs/benchmarks/quality.md

The reference is the default model's file with its blocks dequantized, in float32 throughout, KV cache included. Each
variant reads the same text as `pagoda bench quality` does, and answers real prompts at temperature 0: how many of the
answers are the reference's own, token for token, and how far they go on average before the first difference.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagoda.base.config import config_from_kwargs
from pagoda.base.types import GenerateRequest, SamplingParams
from pagoda.bench.passage import PASSAGE
from pagoda.bench.quality import chunks_of, score
from pagoda.bench.report import machine_line
from pagoda.executor.launch import LocalEngine, build_engine

PROMPTS = Path(__file__).resolve().parents[2] / "shared/data/prompts/gsm8k_train_head64.jsonl"
SMALL: dict[str, Any] = {"kv_cache_memory_bytes": 512 << 20, "max_num_seqs": 16, "max_model_len": 1024}


@dataclass(frozen=True)
class Variant:
    label: str
    options: dict[str, Any]
    dequantize: bool = False


BF16_KV, F32_KV, INT8_KV = ({"kv_cache_dtype": dtype} for dtype in ("bfloat16", "float32", "int8"))
REFERENCE = Variant("float32", {"dtype": "float32", **F32_KV}, dequantize=True)
VARIANTS = [
    Variant("bf16 (blocks dequantized)", {"dtype": "bfloat16", **BF16_KV}, dequantize=True),
    *(
        Variant(label, {**options, "linear_activations": activations, **kv})
        for activations in ("int16", "int8")
        for label, options in (
            ("q4_1, table q8_0 (as the file)", {}),
            (f"{'i8' if activations == 'int8' else 'q8_0'} (`--quantization int8`)", {"quantization": "int8"}),
        )
        for kv in (BF16_KV, F32_KV, INT8_KV)
    ),
]


@dataclass(frozen=True)
class Answers:
    """What an engine says of every position of the text, and its greedy answers to the prompts."""

    weights: str
    logp: list[np.ndarray]
    tokens: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--num-tokens", type=int, default=1024, help="tokens of the text (default: %(default)s)")
    parser.add_argument("--chunk-len", type=int, default=128, help="tokens a chunk (default: %(default)s)")
    parser.add_argument("--answer-len", type=int, default=48, help="tokens of each greedy answer (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON lines with a `question` each (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: only print)")
    options = parser.parse_args()
    questions = [json.loads(line)["question"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    reference, ids = None, None
    lines = []
    for variant in (REFERENCE, *VARIANTS):
        engine = build_engine(config_from_kwargs(**SMALL, **variant.options), dequantize=variant.dequantize)
        ids = ids or chunks_of(engine.tokenizer.encode(PASSAGE)[: options.num_tokens], options.chunk_len)
        found = ask(engine, ids, questions, options.answer_len)
        engine.close()
        if reference is None:
            reference = found
        lines.append(line(variant, found, reference, ids))
        print(lines[-1], flush=True)
    assert ids is not None
    if options.output:
        options.output.write_text(page(lines, sum(map(len, ids)), len(questions), options.answer_len), encoding="utf-8")


def ask(engine: LocalEngine, chunks: Sequence[Sequence[int]], questions: Sequence[str], answer_len: int) -> Answers:
    logp = [score(engine, chunk).astype(np.float32) for chunk in chunks]
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(questions))}
    for i, question in enumerate(questions):
        text = engine.template.render([{"role": "user", "content": question}], add_generation_prompt=True)
        params = SamplingParams(temperature=0.0, max_tokens=answer_len, detokenize=False)
        prompt = engine.tokenizer.encode(text, add_special_tokens=False)
        engine.core.add(GenerateRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    while engine.core.has_work():
        for output in engine.core.step():
            tokens[output.request_id] += output.new_token_ids
    weights = f"{'+'.join(engine.ledger.formats)} {engine.ledger.weights_nbytes / 2**20:.0f} MiB"
    return Answers(weights, logp, list(tokens.values()))


def line(variant: Variant, found: Answers, reference: Answers, chunks: Sequence[Sequence[int]]) -> str:
    targets = np.concatenate([np.array(chunk[1:]) for chunk in chunks])
    p, q = np.concatenate(reference.logp), np.concatenate(found.logp)
    loss = -float(q[np.arange(len(targets)), targets].mean(dtype=np.float64))
    divergence = (np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64)
    same = float((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    prefixes = [common(a, b) / max(len(b), 1) for a, b in zip(found.tokens, reference.tokens, strict=True)]
    equal = sum(a == b for a, b in zip(found.tokens, reference.tokens, strict=True))
    cells = [
        variant.label, variant.options.get("linear_activations", "-"), variant.options["kv_cache_dtype"], found.weights.split()[1] + " MiB",
        f"{np.exp(loss):.3f}", f"{divergence.mean():.5f}", f"{np.percentile(divergence, 99):.4f}", f"{100 * same:.2f} %",
        f"{equal} of {len(prefixes)}", f"{100 * np.mean(prefixes):.0f} %",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def page(lines: Sequence[str], num_tokens: int, num_prompts: int, answer_len: int) -> str:
    head = ["weights", "activations", "KV", "size", "perplexity", "KL mean (nats)", "KL 99 %", "same top token", "answers equal", "equal until"]
    return "\n".join([
        "# Quality by weight format and activation precision",
        "",
        "    python benchmarks/quality_table.py --output docs/benchmarks/quality.md",
        "",
        f"SmolLM2-135M-Instruct (the default Q4_1 file) on the passage of `pagoda bench quality`, {num_tokens} tokens; KL divergence from the same file",
        f"dequantized to float32, nothing else rounded. Answers: {num_prompts} GSM8K questions in the chat template, {answer_len} tokens at temperature 0,",
        "token for token the reference's; `equal until`: the share of an answer before the first difference.",
        "",
        machine_line(),
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *lines,
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
