"""What the harness and a worker say to each other: one JSON object per line, a question in, an answer out.

    {"do": "generate", "requests": [[ids, num_tokens], ...]}  ->  {"wall": s, "first": s or null, "counts": [...]}
    {"do": "answers",  "requests": [[ids, num_tokens], ...]}  ->  {"tokens": [[...], ...]}    eos is not ignored
    {"do": "logits",   "chunks": [ids, ...], "path": FILE}    ->  {"saved": FILE}     see `Engine.logits`

The worker's real standard output is kept for answers; what a library prints goes to standard error. Only the standard
library and numpy are used, because this runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

__all__ = ["Engine", "Generated", "Requests", "serve"]

Requests = list[tuple[list[int], int]]


class Generated(NamedTuple):
    """Tokens of every request, in order, and when the first of all came (`time.perf_counter`; None: not known)."""

    tokens: list[list[int]]
    first_at: float | None = None


class Engine(Protocol):
    """A peer in one process. Greedy throughout."""

    def generate(self, requests: Requests, *, ignore_eos: bool = True) -> Generated:
        """All requests at once; each gets exactly its number of tokens, or fewer where eos counts."""

    def logits(self, chunk: list[int]) -> Any:
        """Logits after every token but the last, float32 (len(chunk) - 1, vocabulary). Not every engine gives them."""


def serve(make: Callable[[argparse.Namespace], Engine]) -> None:
    """The main loop of a worker; ends with its standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-tokens", type=int, default=65536, help="tokens the KV cache is to hold")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    args.options = {name: _value(text) for name, _, text in (item.partition("=") for item in args.option)}
    engine = make(args)
    _say(answers, {"ready": True})
    for line in sys.stdin:
        _say(answers, _answer(engine, json.loads(line)))


def _answer(engine: Engine, question: dict[str, Any]) -> dict[str, Any]:
    if question["do"] == "logits":
        import numpy as np

        np.save(question["path"], np.concatenate([engine.logits(chunk) for chunk in question["chunks"]]))
        return {"saved": question["path"]}
    requests: Requests = [(ids, wanted) for ids, wanted in question["requests"]]
    if question["do"] == "answers":
        return {"tokens": [[int(t) for t in tokens] for tokens in engine.generate(requests, ignore_eos=False).tokens]}
    started = time.perf_counter()
    found = engine.generate(requests)
    wall = time.perf_counter() - started
    first = None if found.first_at is None else found.first_at - started
    return {"wall": wall, "first": first, "counts": [len(tokens) for tokens in found.tokens]}


def _say(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
