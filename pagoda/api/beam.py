"""Beam search over an engine that samples: every step asks for one token of each beam, with logprobs, and picks the beams that go on.

    live    beams that may grow, best first, at most `n`
    done    beams that ended (end token, stop token id, length)

A step offers the 2 n most likely tokens of every live beam; ending ones go to `done`, the n best others stay live. A beam's score
is its log-probability / (number of tokens, the end token aside) ** length_penalty. The search is over when nothing lives, or when no
live beam can still pass the n best that are done. The prefix cache makes a step cost a few tokens per beam, not a whole prompt.

`BeamSearch` does no input or output: `LLM` and `AsyncEngine` drive it, each in its way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from pagoda.base.errors import InvalidRequest
from pagoda.base.types import (
    CompletionOutput,
    FinishReason,
    GenerateRequest,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TokenLogprobs,
)
from pagoda.text.output import TextState
from pagoda.text.tokenizer import Tokenizer

__all__ = ["BeamSearch", "check_beam_params"]

_NEUTRAL = SamplingParams()
_REFUSED = (
    "stop", "bad_words", "logit_bias", "allowed_token_ids", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "structured_outputs", "banned_strings", "prompt_logprobs", "typical_p", "top_n_sigma", "dynatemp_range", "xtc_probability",
    "dry_multiplier", "mirostat_mode",
)  # fmt: skip
"""What changes probabilities or looks at text: beams are ranked by the model's own probabilities of tokens."""


def check_beam_params(params: SamplingParams) -> None:
    """Raises InvalidRequest for what beam search does not do."""
    for name in _REFUSED:
        if getattr(params, name) != getattr(_NEUTRAL, name):
            raise InvalidRequest(f"`{name}` cannot be used together with beam search", param=name)
    if params.output_kind is RequestOutputKind.DELTA:
        raise InvalidRequest("beam search cannot be streamed: the best beam is known only at the end", param="stream")


@dataclass(frozen=True)
class _Beam:
    token_ids: tuple[int, ...] = ()
    tables: tuple[dict[int, Logprob], ...] = ()  # per token: what was offered
    logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None

    def score(self, length_penalty: float) -> float:
        ends_silently = self.finish_reason is FinishReason.STOP
        return self.logprob / math.pow(max(1, len(self.token_ids) - ends_silently), length_penalty)


class BeamSearch:
    """`request` is processed: `max_tokens` set, parameters checked. `eos_token_ids` end a beam unless `ignore_eos`."""

    def __init__(self, request: GenerateRequest, max_model_len: int) -> None:
        check_beam_params(request.params)
        self.request, self.params = request, request.params
        assert self.params.max_tokens is not None
        self._max_tokens = min(self.params.max_tokens, max_model_len - len(request.prompt_token_ids))
        self._end_ids = frozenset(() if self.params.ignore_eos else request.eos_token_ids)
        self._stop_ids = frozenset(self.params.stop_token_ids or ())
        self._live, self._done = [_Beam()], list[_Beam]()
        self._error: str | None = None
        self._metrics: RequestMetrics | None = None
        self._num_cached_tokens = 0

    @property
    def is_finished(self) -> bool:
        return not self._live

    @property
    def step_params(self) -> SamplingParams:
        """Of the request for one token that each of `prompts` is."""
        wanted = max(2 * self.params.n, self.params.logprobs or 0)
        return SamplingParams(
            temperature=0, max_tokens=1, logprobs=wanted, logprobs_mode="raw_logprobs", detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )

    def prompts(self) -> list[list[int]]:
        """Token ids of the live beams, prompt included."""
        return [[*self.request.prompt_token_ids, *beam.token_ids] for beam in self._live]

    def advance(self, outputs: Sequence[RequestOutput]) -> None:
        """One answer per prompt of `prompts`, in that order."""
        failed = [output for output in outputs if output.outputs[0].finish_reason == FinishReason.ERROR]
        if failed:
            self._error, self._live = failed[0].error or "the engine could not finish this request", []
            return
        self._measure(outputs)
        candidates: list[_Beam] = []
        for beam, output in zip(self._live, outputs, strict=True):
            assert output.outputs[0].logprobs, "a step's request asks for logprobs"
            candidates += self._grown(beam, output.outputs[0].logprobs[0])
        self._done += [beam for beam in candidates if beam.finish_reason is not None]
        living = [beam for beam in candidates if beam.finish_reason is None]
        self._done = self._best(self._done)
        self._live = self._best(living)
        if len(self._done) == self.params.n:
            worst = self._done[-1].score(self.params.length_penalty)
            self._live = [beam for beam in self._live if self._highest(beam) > worst]

    def _measure(self, outputs: Sequence[RequestOutput]) -> None:
        """The search begins with its first step and ends with its last."""
        measured = [output.metrics for output in outputs if output.metrics is not None]
        if not measured:
            return
        if self._metrics is None:
            self._metrics, self._num_cached_tokens = msgspec.structs.replace(measured[0]), outputs[0].num_cached_tokens
        self._metrics.last_token_time = max(one.last_token_time for one in measured)
        self._metrics.num_preemptions += sum(one.num_preemptions for one in measured)

    def _grown(self, beam: _Beam, table: dict[int, Logprob]) -> list[_Beam]:
        ranked = sorted(table.items(), key=lambda item: (-item[1].logprob, item[0]))[: 2 * self.params.n]
        num_tokens = len(beam.token_ids) + 1
        grown = []
        for token_id, entry in ranked:
            reason, stop_reason = self._ending(token_id, num_tokens)
            if reason is FinishReason.STOP and num_tokens <= self.params.min_tokens:
                continue
            tokens, tables = (*beam.token_ids, token_id), (*beam.tables, table)
            grown.append(_Beam(tokens, tables, beam.logprob + entry.logprob, reason, stop_reason))
        return grown

    def _ending(self, token_id: int, num_tokens: int) -> tuple[FinishReason | None, int | None]:
        if token_id in self._end_ids:
            return FinishReason.STOP, None
        if token_id in self._stop_ids:
            return FinishReason.STOP, token_id
        return (FinishReason.LENGTH, None) if num_tokens >= self._max_tokens else (None, None)

    def _best(self, beams: list[_Beam]) -> list[_Beam]:
        penalty = self.params.length_penalty
        return sorted(beams, key=lambda beam: (-beam.score(penalty), beam.token_ids))[: self.params.n]

    def _highest(self, beam: _Beam) -> float:
        """No score that `beam` can grow to is above it: log-probabilities only fall, and the divisor is monotonic."""
        penalty = self.params.length_penalty
        return max(beam.logprob / math.pow(length, penalty) for length in (len(beam.token_ids), self._max_tokens))

    def output(self, prompt: str | None, tokenizer: Tokenizer, *, cut: FinishReason = FinishReason.ABORT) -> RequestOutput:
        """The `n` best beams, best first; beams that still live end with `cut`. After an error: one sample that says so."""
        beams = self._best([*self._done, *(replace(beam, finish_reason=cut) for beam in self._live)])
        if self._error is not None:
            beams = [_Beam(finish_reason=FinishReason.ERROR)]
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[self._sample(index, beam, tokenizer) for index, beam in enumerate(beams)],
            finished=True,
            metrics=self._metrics,
            num_cached_tokens=self._num_cached_tokens,
            error=self._error,
        )

    def _sample(self, index: int, beam: _Beam, tokenizer: Tokenizer) -> CompletionOutput:
        reason = beam.finish_reason
        assert reason is not None
        state = TextState(tokenizer, self.params, self.request.prompt_token_ids)
        positions = [_position(token_id, table, self.params.logprobs) for token_id, table in zip(beam.token_ids, beam.tables, strict=True)]
        delta = state.push(beam.token_ids, None if self.params.logprobs is None else positions, reason)
        return CompletionOutput(
            index=index,
            text=delta.text,
            token_ids=list(beam.token_ids),
            cumulative_logprob=beam.logprob,
            logprobs=delta.logprobs,
            finish_reason=reason.value,
            stop_reason=beam.stop_reason,
        )


def _position(token_id: int, table: dict[int, Logprob], count: int | None) -> TokenLogprobs:
    ranked = sorted(table.items(), key=lambda item: (-item[1].logprob, item[0]))
    rank = next(place for place, (other, _) in enumerate(ranked, start=1) if other == token_id)
    shown = ranked if count == -1 else ranked[: count or 0]
    return TokenLogprobs([token_id, *(i for i, _ in shown)], [table[token_id].logprob, *(entry.logprob for _, entry in shown)], rank)
