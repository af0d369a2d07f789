"""Answers of every contender against float32, by one script: what a precision is worth before its speed is compared.

The reference is the default model's file dequantized, in float32 throughout, KV cache included. llama.cpp's own float32 is
among the rows, as a witness that two programs mean the same model. Each contender gives its logits at every position of
the passage of `pagoda bench quality`, in chunks, and greedy answers to real prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.peers import models
from benchmarks.peers.contenders import Contender
from benchmarks.peers.environments import CACHE, PeerAbsent
from benchmarks.peers.offline import log_of
from benchmarks.peers.session import Worker
from benchmarks.quality_table import PROMPTS, common
from pagoda.base.config import config_from_kwargs
from pagoda.bench.passage import PASSAGE
from pagoda.bench.quality import chunks_of
from pagoda.executor.front import Front, load_front

__all__ = ["Quality", "compare", "run_quality"]

_NUM_TOKENS, _CHUNK_LEN, _ANSWER_LEN, _EOS = 1024, 128, 48, 2
_F32 = {"dtype": "float32", "kv_cache_dtype": "float32", "dequantize": True}
REFERENCE = Contender("pagoda", "float32", "float32", models.default_file, _F32)
_WITNESS = Contender("llama.cpp", "float32", "F32", lambda: models.gguf("F32"), {"kv": "f32"})
_ALSO = Contender("pagoda", "8bit", "int8, int16 activations", models.default_file, {"quantization": "int8"}, is_main=False)


@dataclass(frozen=True)
class Quality:
    """Nats; shares of 1. None where an engine gives no logits, or there are no prompts."""

    perplexity: float | None = None
    divergence: float | None = None
    divergence_p99: float | None = None
    same_top: float | None = None
    answers_equal: float | None = None
    equal_until: float | None = None


@dataclass(frozen=True)
class _Said:
    logp_TV: np.ndarray | None
    answers: list[list[int]]


def run_quality(contenders: Sequence[Contender], num_threads: int, absent: dict[str, str]) -> dict[str, dict[str, float | None]]:
    """Name -> the fields of a Quality. Whoever cannot be started is noted in `absent`."""
    front = load_front(config_from_kwargs(None))
    ids = front.tokenizer.encode(PASSAGE, add_special_tokens=False)[:_NUM_TOKENS]
    chunks, prompts = chunks_of(ids, _CHUNK_LEN), _prompts(front)
    targets = np.concatenate([np.array(chunk[1:]) for chunk in chunks])
    peers = {c.peer for c in contenders}
    todo = [*([_WITNESS] if "llama.cpp" in peers else []), *contenders, _ALSO]
    reference, found = _ask(REFERENCE, chunks, prompts, num_threads), {}
    for contender in todo:
        try:
            said = _ask(contender, chunks, prompts, num_threads)
        except (PeerAbsent, RuntimeError) as error:
            absent[f"{contender.name}, quality"] = str(error)
            print(f"quality {contender.name}: absent: {error}", flush=True)
            continue
        found[contender.name] = vars(compare(reference, said, targets))
        print(f"quality {contender.name}: " + ", ".join(f"{k} {v:.5g}" for k, v in found[contender.name].items() if v is not None), flush=True)
    return found


def _prompts(front: Front) -> list[list[int]]:
    """GSM8K questions in the chat template; none where the file is not there."""
    if not PROMPTS.is_file() or front.template is None:
        print("no greedy answers: the prompts' file is not there", flush=True)
        return []
    questions = [json.loads(line)["question"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    texts = [front.template.render([{"role": "user", "content": question}], add_generation_prompt=True) for question in questions]
    return [front.tokenizer.encode(text, add_special_tokens=False) for text in texts]


def _ask(contender: Contender, chunks: list[list[int]], prompts: list[list[int]], num_threads: int) -> _Said:
    contender.prepare()
    path = CACHE / "logits.npy"
    worker = Worker(contender.name, contender.command(num_threads, 32768), contender.environment(num_threads, 32768), log_of(contender, "quality"))
    try:
        answers = worker.ask({"do": "answers", "requests": [(prompt, _ANSWER_LEN) for prompt in prompts]})["tokens"] if prompts else []
        logp_TV = None
        if contender.peer != "vllm":
            worker.ask({"do": "logits", "chunks": chunks, "path": str(path)})
            logp_TV = _log_softmax(np.load(path))
        return _Said(logp_TV, [_without_eos(tokens) for tokens in answers])
    finally:
        worker.close()
        path.unlink(missing_ok=True)


def compare(reference: _Said, said: _Said, targets_T: np.ndarray) -> Quality:
    """Divergence is sum over the vocabulary of p_ref (log p_ref - log p), per position."""
    quality = Quality()
    if said.logp_TV is not None and reference.logp_TV is not None:
        p, q = reference.logp_TV, said.logp_TV
        divergence = (np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64)
        loss = -float(q[np.arange(len(targets_T)), targets_T].mean(dtype=np.float64))
        quality = Quality(
            perplexity=float(np.exp(loss)),
            divergence=float(divergence.mean()),
            divergence_p99=float(np.percentile(divergence, 99)),
            same_top=float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
        )
    if not reference.answers:
        return quality
    pairs = list(zip(said.answers, reference.answers, strict=True))
    return replace(
        quality,
        answers_equal=float(np.mean([a == b for a, b in pairs])),
        equal_until=float(np.mean([common(a, b) / max(len(b), 1) for a, b in pairs])),
    )


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    logits_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    logp_TV: np.ndarray = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logp_TV


def _without_eos(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(_EOS)] if _EOS in tokens else tokens
