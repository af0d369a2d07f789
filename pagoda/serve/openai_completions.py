"""POST /v1/completions: OpenAI's text completion, with vLLM's extra fields.

The prompt is a string, a list of strings, token ids, or a list of token id lists. Choice i * n + j is sample j of prompt i.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Literal

import msgspec

from pagoda import __version__
from pagoda.base.errors import InvalidRequest
from pagoda.base.types import CompletionOutput, RequestMetrics, RequestOutput
from pagoda.serve.context import ModelContext
from pagoda.serve.generation import Call
from pagoda.serve.logprobs import (
    CompletionLogprobs,
    Position,
    PromptLogprob,
    TokenNamer,
    completion_logprobs,
    prompt_logprobs,
)
from pagoda.serve.sse import DONE, event
from pagoda.serve.wire import (
    GenerationFields,
    Int,
    PromptTokensDetails,
    StreamOptions,
    Timings,
    Usage,
    check_common,
    decode_body,
    given_or,
    sampling_params,
    structured_outputs,
    structured_warnings,
    timings,
)

__all__ = ["Completion", "CompletionRequest", "parse"]

MAX_PROMPTS = 1024


class CompletionRequest(GenerationFields, kw_only=True):
    prompt: str | list[str | Int | list[Int]]
    suffix: str | None = None
    best_of: Int | None = None
    echo: bool | None = None
    logprobs: Int | None = None


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A whole answer, and also one event of a stream (then `usage` is there only when asked for)."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str | None = f"pagoda-{__version__}"
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    metrics: Timings | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class _Prompt:
    text: str | None
    token_ids: list[int]


def parse(raw: bytes, given_id: str | None, context: ModelContext) -> Call:
    """Body -> Call. Raises InvalidRequest (400) or NotFound (404)."""
    body, warnings = decode_body(raw, CompletionRequest)
    context.check_model(body.model)
    check_common(body)
    num_samples, best_of = body.n or 1, body.best_of or body.n or 1
    _check(body, num_samples, best_of, context)
    prompts = _prompts(body, context)
    is_scoring = body.max_tokens == 0
    ranks = best_of > num_samples
    context.check_max_tokens("max_tokens", body.max_tokens)
    changes: dict[str, object] = {"logprobs": 0 if ranks and body.logprobs is None else body.logprobs}
    if body.max_tokens is not None:
        changes["max_tokens"] = 1 if is_scoring else body.max_tokens
    if best_of != num_samples:
        changes["n"] = best_of
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        changes["prompt_logprobs"] = body.logprobs
    changes["structured_outputs"] = wanted = structured_outputs(body)
    warnings += structured_warnings(wanted)
    params = sampling_params(body, {"max_tokens": 16, **context.default_params}, **changes)
    response_id = f"cmpl-{given_id or body.request_id or uuid.uuid4().hex}"
    return Call(
        response_id=response_id,
        prompts=[{"prompt_token_ids": prompt.token_ids, "prompt": prompt.text} for prompt in prompts],
        params=params,
        renderer=CompletionRenderer(response_id, body, prompts, context),
        stream=bool(body.stream),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        warnings=warnings,
    )


def _check(body: CompletionRequest, num_samples: int, best_of: int, context: ModelContext) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("`max_tokens` must be at least 1 (0 only with `echo`: true, to score a prompt), got 0", param="max_tokens")
    if best_of < num_samples:
        raise InvalidRequest(f"`best_of` must be at least `n`={num_samples}, got {best_of}", param="best_of")
    if best_of > num_samples and body.stream:
        raise InvalidRequest("`best_of` above `n` cannot be streamed: the best is known only at the end", param="best_of")
    top, limit = body.logprobs, context.max_logprobs
    if top is not None and (top < -1 or (limit != -1 and (top > limit or top == -1))):
        raise InvalidRequest(f"`logprobs` must be between 0 and {limit} (--max-logprobs), got {top}", param="logprobs")


def _prompts(body: CompletionRequest, context: ModelContext) -> list[_Prompt]:
    """The four shapes of `prompt`. Raises InvalidRequest for an empty or mixed list."""
    special = body.add_special_tokens is not False
    given = body.prompt
    items: list[str | list[int]]
    if isinstance(given, str):
        items = [given]
    elif not given:
        raise InvalidRequest("`prompt` must not be empty", param="prompt")
    elif all(isinstance(item, int) for item in given):
        items = [given]  # type: ignore[list-item]
    elif any(isinstance(item, int) for item in given):
        raise InvalidRequest("`prompt` must be a string, a list of strings, token ids, or lists of token ids, not a mixture", param="prompt")
    else:
        items = given  # type: ignore[assignment]
    if len(items) > MAX_PROMPTS:
        raise InvalidRequest(f"`prompt` has {len(items)} prompts; at most {MAX_PROMPTS} fit in one request", param="prompt")
    if body.suffix:
        return [_infill(item, body.suffix, special, context) for item in items]
    return [_prompt(item, special, bool(body.echo), context) for item in items]


def _infill(item: str | list[int], suffix: str, special: bool, context: ModelContext) -> _Prompt:
    """What stands before and behind the gap, between the model's own marks."""
    tokenizer = context.tokenizer
    marks = [tokenizer.infill_ids.get(role) for role in ("fim_prefix", "fim_suffix", "fim_middle")]
    before, behind, middle = marks
    if before is None or behind is None or middle is None:
        raise InvalidRequest("`suffix` needs a model with infill tokens, which this one has not", param="suffix", code="unsupported")
    if not isinstance(item, str):
        raise InvalidRequest("`suffix` needs `prompt` to be text", param="suffix")
    bare = tokenizer.encode(item, add_special_tokens=False)
    whole = tokenizer.encode(item, add_special_tokens=special)
    begins = whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else []
    return _Prompt(item, [*begins, before, *bare, behind, *tokenizer.encode(suffix, add_special_tokens=False), middle])


def _prompt(item: str | list[int], special: bool, needs_text: bool, context: ModelContext) -> _Prompt:
    if isinstance(item, str):
        return _Prompt(item, context.tokenizer.encode(item, add_special_tokens=special))
    if not item:
        raise InvalidRequest("`prompt` has an empty list of token ids", param="prompt")
    if min(item) < 0 or max(item) >= context.tokenizer.vocab_size:
        raise InvalidRequest(f"`prompt` has token ids outside 0..{context.tokenizer.vocab_size - 1}", param="prompt")
    return _Prompt(context.tokenizer.decode(item, skip_special_tokens=False) if needs_text else None, item)


class CompletionRenderer:
    """Engine outputs -> OpenAI's completion objects."""

    def __init__(self, response_id: str, body: CompletionRequest, prompts: list[_Prompt], context: ModelContext) -> None:
        self._id, self._created, self._model = response_id, int(time.time()), context.model_names[0]
        self._prompts = prompts
        self._num_samples = body.n or 1
        self._num_top = -1 if body.logprob_token_ids and body.logprobs is not None else body.logprobs
        self._is_echo, self._is_scoring = bool(body.echo), body.max_tokens == 0
        self._has_prompt_logprobs = body.prompt_logprobs is not None
        self._has_token_ids = bool(body.return_token_ids)
        self._namer = TokenNamer(context.tokenizer, given_or(body.return_tokens_as_token_ids, context.names_tokens_by_id))
        options = body.stream_options or StreamOptions()
        self._has_usage = bool(options.include_usage) or context.forces_usage
        self._has_running_usage = bool(options.continuous_usage_stats) and self._has_usage
        self._num_prompt = [0] * len(prompts)
        self._num_cached = [0] * len(prompts)
        self._num_generated = 0
        self._prompt_logprobs: list[list[Position | None] | None] = [None] * len(prompts)
        self._tells_timings = context.tells_timings
        self._measured: list[RequestMetrics] = []
        self._offsets: dict[int, int] = {}  # choice -> characters said so far; a choice without entry has not begun

    def whole(self, outputs: list[RequestOutput]) -> bytes:
        choices = []
        for prompt_idx, output in enumerate(outputs):
            self._note(prompt_idx, output)
            samples = sorted(output.outputs, key=lambda s: s.index)
            if len(samples) > self._num_samples:
                samples = sorted(samples, key=_mean_logprob, reverse=True)[: self._num_samples]
            choices += [self._choice(prompt_idx, j, sample, output) for j, sample in enumerate(samples)]
        answer = self._completion(choices)
        answer.usage, answer.metrics = self._usage(), self._timings()
        return msgspec.json.encode(answer)

    def opening(self) -> bytes:
        return b""

    def delta(self, prompt_idx: int, output: RequestOutput) -> bytes:
        self._note(prompt_idx, output)
        chunks = []
        for sample in output.outputs:
            starts = prompt_idx * self._num_samples + sample.index not in self._offsets
            wants_tokens = sample.token_ids and (self._num_top is not None or self._has_token_ids)
            if not (sample.text or sample.finish_reason or wants_tokens or (starts and self._is_echo)):
                continue  # a character or a possible stop string is still incomplete
            chunk = self._completion([self._choice(prompt_idx, sample.index, sample, output)])
            if self._has_running_usage:
                chunk.usage = self._usage()
            chunks.append(event(chunk))
        return b"".join(chunks)

    def closing(self) -> bytes:
        if not self._has_usage:
            return DONE
        chunk = self._completion([])
        chunk.usage, chunk.metrics = self._usage(), self._timings()
        return event(chunk) + DONE

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices)

    def _timings(self) -> Timings | msgspec.UnsetType:
        if not self._tells_timings:
            return msgspec.UNSET
        return timings(self._measured, self._num_generated, self._num_samples * len(self._prompts))

    def _note(self, prompt_idx: int, output: RequestOutput) -> None:
        if output.metrics is not None:
            self._measured.append(output.metrics)
        self._num_prompt[prompt_idx] = len(output.prompt_token_ids) or self._num_prompt[prompt_idx]
        self._num_cached[prompt_idx] = max(self._num_cached[prompt_idx], output.num_cached_tokens)
        if output.prompt_logprobs is not None:  # said once, and every sample echoes the prompt
            self._prompt_logprobs[prompt_idx] = list(output.prompt_logprobs)
        if not self._is_scoring:
            self._num_generated += sum(len(sample.token_ids) for sample in output.outputs)

    def _usage(self) -> Usage:
        num_prompt = sum(self._num_prompt)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_generated,
            total_tokens=num_prompt + self._num_generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached)),
        )

    def _choice(self, prompt_idx: int, sample_idx: int, sample: CompletionOutput, output: RequestOutput) -> CompletionChoice:
        """One choice, whole or delta: the prompt is echoed when it begins."""
        index = prompt_idx * self._num_samples + sample_idx
        starts = index not in self._offsets
        text = "" if self._is_scoring else sample.text
        if starts and self._is_echo:
            text = (self._prompts[prompt_idx].text or "") + text
        choice = CompletionChoice(index=index, text=text, finish_reason=sample.finish_reason, stop_reason=sample.stop_reason)
        if self._num_top is not None:
            choice.logprobs = self._logprobs(index, starts and self._is_echo, sample, output)
        self._offsets.setdefault(index, 0)
        if self._has_token_ids:
            choice.token_ids = [] if self._is_scoring else sample.token_ids
            if starts:
                choice.prompt_token_ids = output.prompt_token_ids
        if self._has_prompt_logprobs:
            choice.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return choice

    def _logprobs(self, index: int, echoes: bool, sample: CompletionOutput, output: RequestOutput) -> CompletionLogprobs:
        prompt_idx = index // self._num_samples
        token_ids: list[int] = []
        positions: list[Position | None] = []
        offset = self._offsets.get(index, 0)
        if echoes:
            prompt_positions = self._prompt_logprobs[prompt_idx]
            if prompt_positions is None:
                offset = len(self._prompts[prompt_idx].text or "")
            else:
                token_ids += output.prompt_token_ids
                positions += prompt_positions
        if not self._is_scoring:
            token_ids += sample.token_ids
            positions += sample.logprobs or []
        logprobs, self._offsets[index] = completion_logprobs(
            token_ids, positions, self._num_top or 0, self._namer, offset
        )
        return logprobs


def _mean_logprob(sample: CompletionOutput) -> float:
    """best_of's order: log probability per token."""
    return (sample.cumulative_logprob or 0.0) / max(1, len(sample.token_ids))
