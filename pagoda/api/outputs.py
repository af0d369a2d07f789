"""From what the core sampled to what a caller reads: one RequestStream per request in flight.

    push(EngineOutput)   text grows, stop strings are looked for
    take()               a RequestOutput of everything since the last take, in the kind the caller asked for

The two are apart so that a slow reader gets fewer, larger outputs and nothing is built that nobody reads.
"""

from __future__ import annotations

import msgspec

from pagoda.base.clock import monotonic
from pagoda.base.errors import RequestError, RequestFailed, request_error
from pagoda.base.types import (
    CompletionOutput,
    EngineOutput,
    FinishReason,
    GenerateRequest,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
)
from pagoda.text.output import TextDelta, TextState, decode_logprobs
from pagoda.text.tokenizer import Tokenizer

__all__ = ["RequestStream"]

_TOKEN_NBYTES, _LOGPROB_NBYTES = 32, 200  # what the objects take, about


class _Sample:
    """One of the n answers: everything so far, and where the last `take` ended."""

    def __init__(self, index: int, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self.index = index
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.is_dirty = False
        self.num_tokens = 0
        self.pending_nbytes = 0  # about, of what the next `take` gives
        self._text_state = TextState(tokenizer, request.params, request.prompt_token_ids)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if request.params.logprobs is None else []
        self._cumulative_logprob = 0.0

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    def push(self, output: EngineOutput) -> bool:
        """True when a stop string ended the sample: the core does not know, and must be told."""
        delta: TextDelta = self._text_state.push(output.new_token_ids, output.logprobs, output.finish_reason, output.stop_reason)
        self.is_dirty = True
        self.num_tokens += len(delta.token_ids)
        self._text.append(delta.text)
        self.pending_nbytes += len(delta.text) + _TOKEN_NBYTES * len(delta.token_ids)
        self._token_ids += delta.token_ids
        if self._logprobs is not None and delta.logprobs is not None:
            self._logprobs += delta.logprobs
            self.pending_nbytes += _LOGPROB_NBYTES * sum(len(table) for table in delta.logprobs)
            for token_id, table in zip(delta.token_ids, delta.logprobs, strict=True):
                self._cumulative_logprob += table[token_id].logprob
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        return self.is_finished and output.finish_reason is None

    def end(self, reason: FinishReason) -> None:
        self.finish_reason, self.is_dirty = reason, True

    def take(self, *, is_delta: bool) -> CompletionOutput:
        self.is_dirty, self.pending_nbytes = False, 0
        text = "".join(self._text)
        taken = CompletionOutput(
            index=self.index,
            text=text,
            token_ids=self._token_ids,
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=self._logprobs,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=self.stop_reason,
        )
        if is_delta:
            self._text, self._token_ids = [], []
            self._logprobs = None if self._logprobs is None else []
        else:
            self._text = [text]
            if not self.is_finished:  # the caller keeps what it was given; we go on with copies
                self._token_ids = self._token_ids.copy()
                self._logprobs = None if self._logprobs is None else self._logprobs.copy()
        return taken


class RequestStream:
    """All n samples of one request, from the first token to the end."""

    def __init__(self, request: GenerateRequest, prompt: str | None, tokenizer: Tokenizer) -> None:
        self.request = request
        self.error: RequestError | None = None  # of the first sample that failed
        self._prompt = prompt
        self._tokenizer = tokenizer
        self._samples = [_Sample(index, request, tokenizer) for index in range(request.params.n)]
        self._num_unfinished = len(self._samples)
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._metrics: RequestMetrics | None = None
        self._num_cached_tokens = 0

    @property
    def is_finished(self) -> bool:
        return self._num_unfinished == 0

    @property
    def has_tokens(self) -> bool:
        """Whether anything was sampled."""
        return any(sample.num_tokens for sample in self._samples)

    def push(self, output: EngineOutput) -> bool:
        """Takes one output of the core. True when a stop string ended that sample, which the caller must abort with STOP.

        Outputs of a sample that has ended here (its abort was under way) change nothing.
        """
        sample = self._samples[output.index]
        if sample.is_finished:
            return False
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = self._decode_prompt(output)
        if output.index == 0:
            self._num_cached_tokens = output.num_cached_tokens
        if output.metrics is not None:
            self._metrics = output.metrics
        if output.finish_reason is FinishReason.ERROR:
            self._fail(output)
        must_abort = sample.push(output)
        if sample.is_finished:
            self._num_unfinished -= 1
        if must_abort and self._metrics is not None:  # the core's last word will come when nobody waits for it
            self._metrics = msgspec.structs.replace(self._metrics, last_token_time=monotonic())
        return must_abort

    def _fail(self, output: EngineOutput) -> None:
        if self.error is None:
            self.error = request_error(output.error_type, output.error or "the engine could not finish this request", output.error_param)

    def _decode_prompt(self, output: EngineOutput) -> list[dict[int, Logprob] | None]:
        positions = output.prompt_logprobs or []
        decoded = iter(decode_logprobs(self._tokenizer, [position for position in positions if position is not None]))
        return [None if position is None else next(decoded) for position in positions]

    @property
    def pending_nbytes(self) -> int:
        """About how much waits for a reader who takes what is new; 0 for one who waits for the end."""
        if self.request.params.output_kind is not RequestOutputKind.DELTA:
            return 0
        return sum(sample.pending_nbytes for sample in self._samples)

    def fail(self, error: Exception) -> None:
        """Ends every sample here; the core still has to be told."""
        if self.error is None:
            self.error = error if isinstance(error, RequestError) else RequestFailed(f"{type(error).__name__}: {error}")
        for sample in self._samples:
            if not sample.is_finished:
                sample.end(FinishReason.ERROR)
        self._num_unfinished = 0

    def take(self) -> RequestOutput | None:
        """What is new since the last take, or None when the caller wants nothing yet."""
        kind = self.request.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not self.is_finished:
            return None
        is_delta = kind is RequestOutputKind.DELTA
        if not any(sample.is_dirty for sample in self._samples):
            return None
        samples = [sample for sample in self._samples if sample.is_dirty or not is_delta]
        output = RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs,
            outputs=[sample.take(is_delta=is_delta) for sample in samples],
            finished=self.is_finished,
            metrics=self._metrics if self.is_finished else None,
            num_cached_tokens=self._num_cached_tokens,
            error=None if self.error is None else self.error.message,
        )
        if is_delta:
            self._prompt_logprobs = None
        return output
