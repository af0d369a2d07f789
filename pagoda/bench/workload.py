"""Requests to measure with: random tokens, lines of a text, or a file of prompts. The same seed gives the same requests.

    random     token ids without meaning, of given lengths (--input-len, --output-len, --random-range-ratio)
    sonnet     a shared prefix and lines of a poem (--dataset-path; the built-in passage without it)
    sharegpt   JSON or JSONL of conversations [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]
    custom     JSONL of {"prompt": ..., "output_tokens": ...} (the second optional)
    recorded   what `pagoda serve --record-arrivals FILE` wrote: the same prompts and parameters, at the same times
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pagoda.base.config import field
from pagoda.base.errors import ConfigError
from pagoda.bench.passage import PASSAGE
from pagoda.text.tokenizer import Tokenizer

__all__ = ["Workload", "WorkloadRequest", "make_requests"]


class WorkloadRequest(NamedTuple):
    """`prompt_token_ids` is what is computed; the same text may have other tokens when a server tokenizes it again."""

    prompt_token_ids: list[int]
    output_len: int
    at: float | None = None  # seconds after the first request; None: as the options say
    fields: dict[str, Any] = {}  # of its body, where they are its own


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked. Fields of the options of every measurement that sends many requests."""

    num_prompts: int = field(100, "requests to send")
    dataset_name: Literal["random", "sonnet", "sharegpt", "custom", "recorded"] = field("random", "where the prompts come from")
    dataset_path: str | None = field(None, "file of the data set")
    input_len: int | None = field(None, "tokens of a prompt (random: 256, sonnet: 550); of the others: at most")
    output_len: int | None = field(None, "tokens of an answer (random and custom: 128, sonnet: 150, sharegpt: as in the file)")
    random_range_ratio: float = field(0.0, "random lengths lie in [1 - r, 1 + r] of the given ones", metavar="R")
    random_prefix_len: int = field(0, "random: tokens in front of every prompt that are the same for all")
    sonnet_prefix_len: int = field(200, "sonnet: tokens in front of every prompt that are the same for all")


def make_requests(options: Workload, tokenizer: Tokenizer, *, seed: int, max_model_len: int) -> list[WorkloadRequest]:
    """The requests, in the order in which they are sent. ConfigError for a file that does not fit or lengths that cannot work."""
    if options.num_prompts < 1:
        raise ConfigError(f"`--num-prompts` must be at least 1, got {options.num_prompts}")
    requests = _MAKERS[options.dataset_name](options, tokenizer, np.random.default_rng(seed))
    for request in requests:
        num_tokens = len(request.prompt_token_ids) + request.output_len
        if num_tokens > max_model_len:
            raise ConfigError(
                f"a prompt of {len(request.prompt_token_ids)} tokens and {request.output_len} of output are more than the model's context of "
                f"{max_model_len}; lower --input-len or --output-len"
            )
    return requests


def _random(options: Workload, tokenizer: Tokenizer, rng: np.random.Generator) -> list[WorkloadRequest]:
    if not 0.0 <= options.random_range_ratio < 1.0:
        raise ConfigError(f"`--random-range-ratio` must be at least 0 and below 1, got {options.random_range_ratio}")
    ordinary = np.array([i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids])
    prefix = rng.choice(ordinary, options.random_prefix_len).tolist()
    num = options.num_prompts
    input_lens = _lengths(options.input_len or 256, options.random_range_ratio, num, rng)
    output_lens = _lengths(options.output_len or 128, options.random_range_ratio, num, rng)
    return [WorkloadRequest(prefix + rng.choice(ordinary, n).tolist(), m) for n, m in zip(input_lens, output_lens, strict=True)]


def _lengths(middle: int, ratio: float, num: int, rng: np.random.Generator) -> list[int]:
    low, high = max(1, round(middle * (1 - ratio))), max(1, round(middle * (1 + ratio)))
    return [int(n) for n in rng.integers(low, high + 1, num)]


def _sonnet(options: Workload, tokenizer: Tokenizer, rng: np.random.Generator) -> list[WorkloadRequest]:
    text = PASSAGE if options.dataset_path is None else _read(options.dataset_path)
    lines = [tokenizer.encode(line.strip() + "\n", add_special_tokens=False) for line in text.splitlines() if line.strip()]
    input_len, prefix_len = options.input_len or 550, options.sonnet_prefix_len
    if prefix_len > input_len:
        raise ConfigError(f"`--sonnet-prefix-len` {prefix_len} is more than the whole prompt's {input_len} (--input-len)")
    prefix = _take(lines, prefix_len)
    requests = []
    for _ in range(options.num_prompts):
        order = [lines[i] for i in rng.permutation(len(lines))]
        requests.append(WorkloadRequest(prefix + _take(order, input_len - len(prefix)), options.output_len or 150))
    return requests


def _take(lines: Sequence[list[int]], num_tokens: int) -> list[int]:
    """Exactly that many tokens of the lines, from the start again where they end."""
    found: list[int] = []
    while len(found) < num_tokens:
        for line in lines:
            found += line
            if len(found) >= num_tokens:
                break
    return found[:num_tokens]


def _sharegpt(options: Workload, tokenizer: Tokenizer, rng: np.random.Generator) -> list[WorkloadRequest]:
    def pairs() -> Iterator[tuple[str, str | None]]:
        for row in _rows(options):
            turns = row.get("conversations") or row.get("conversation") or []
            if len(turns) >= 2:
                yield turns[0]["value"], turns[1]["value"]

    def output_len(answer: str | None) -> int:
        return len(tokenizer.encode(answer or "", add_special_tokens=False))

    return _from_texts(options, tokenizer, rng, pairs, output_len)


def _custom(options: Workload, tokenizer: Tokenizer, rng: np.random.Generator) -> list[WorkloadRequest]:
    def pairs() -> Iterator[tuple[str, str | None]]:
        for row in _rows(options):
            yield row["prompt"], row.get("output_tokens")

    return _from_texts(options, tokenizer, rng, pairs, lambda given: int(given or 128))


def _recorded(options: Workload, tokenizer: Tokenizer, rng: np.random.Generator) -> list[WorkloadRequest]:
    """In the order of arrival, at most --num-prompts. Where the end was recorded the answer gets its length, else up to `max_tokens`."""
    rows = _rows(options)
    try:
        lengths = {row["id"]: int(row["output_tokens"]) for row in rows if row.get("finish_reason")}
        arrived = [row for row in rows if "prompt_token_ids" in row][: options.num_prompts]
        start = arrived[0]["at"] if arrived else 0.0
        requests = []
        for row in arrived:
            fields = {name: value for name, value in row["fields"].items() if name not in ("stream", "max_tokens", "timeout")}
            if fields.get("use_beam_search"):
                fields["stream"] = False  # beams cannot be streamed
            recorded = lengths.get(row["id"])
            length = -(-recorded // fields.get("n", 1)) if recorded else int(row["fields"]["max_tokens"] or 16)
            requests.append(WorkloadRequest(row["prompt_token_ids"], max(1, options.output_len or length), row["at"] - start, fields))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"`--dataset-path {options.dataset_path}` does not look like `recorded`: {error!r}") from None
    if not requests:
        raise ConfigError(f"`--dataset-path {options.dataset_path}` has no prompts")
    return requests


def _from_texts(
    options: Workload,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    pairs: Callable[[], Iterator[tuple[str, str | None]]],
    output_len: Callable[[str | None], int],
) -> list[WorkloadRequest]:
    """Prompts of a file in random order, from the start again where it has too few."""
    try:
        found = list(pairs())
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"`--dataset-path {options.dataset_path}` does not look like `{options.dataset_name}`: {error!r}") from None
    if not found:
        raise ConfigError(f"`--dataset-path {options.dataset_path}` has no prompts")
    order = rng.permutation(len(found))
    requests = []
    for i in range(options.num_prompts):
        prompt, answer = found[order[i % len(order)]]
        ids = tokenizer.encode(prompt)[: options.input_len]
        requests.append(WorkloadRequest(ids, max(1, options.output_len or output_len(answer))))
    return requests


def _rows(options: Workload) -> list[dict[str, Any]]:
    if options.dataset_path is None:
        raise ConfigError(f"`--dataset-name {options.dataset_name}` needs a file: --dataset-path")
    text = _read(options.dataset_path)
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError(f"`--dataset-path {options.dataset_path}` is not valid JSON or JSONL: {error}") from None
    return list(rows)


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`--dataset-path {path}` cannot be read: {error}") from None


_MAKERS = {"random": _random, "sonnet": _sonnet, "sharegpt": _sharegpt, "custom": _custom, "recorded": _recorded}
