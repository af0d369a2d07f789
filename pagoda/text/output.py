"""From what the engine sampled to what a client reads, for one sample of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pagoda.base.types import FinishReason, Logprob, SamplingParams, TokenLogprobs
from pagoda.text.detokenize import Detokenizer, make_detokenizer
from pagoda.text.stop import StopChecker
from pagoda.text.tokenizer import Tokenizer

__all__ = ["TextDelta", "TextState", "decode_logprobs"]


class TextDelta(NamedTuple):
    """What is new. `token_ids` and `logprobs` are those up to the end of the stop string, if one was met.

    `finish_reason` is the engine's, or STOP where a stop string was met: then `stop_reason` is that string, no further
    push is allowed, and the engine must be told to abort the rest.
    """

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


class TextState:
    """Detokenizer and stop strings of one sample. Its memory does not grow with the sample."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._num_tokens = 0
        self._is_finished = False
        self._detokenizer: Detokenizer | None = None
        if params.detokenize:
            self._detokenizer = make_detokenizer(
                tokenizer,
                prompt_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        include = params.include_stop_str_in_output
        self._stops = StopChecker(params.stop, include_stop_str_in_output=include) if params.stop else None

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
        finish_reason: FinishReason | None = None,
        stop_reason: int | str | None = None,
    ) -> TextDelta:
        """One engine output of this sample. `finish_reason` STOP means that the last token ended it: that token's text
        is left out unless stop strings are to be included."""
        assert not self._is_finished, "pushed after the end"
        num_used, text, stop = self._read(token_ids, finish_reason)
        if stop is not None:
            finish_reason, stop_reason = FinishReason.STOP, stop
        self._is_finished = finish_reason is not None
        used = list(token_ids[:num_used])
        decoded = None if logprobs is None else decode_logprobs(self._tokenizer, logprobs[:num_used])
        return TextDelta(text, used, decoded, finish_reason, stop_reason)

    def _read(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> tuple[int, str, str | None]:
        """How many tokens count, their text, and the stop string they completed."""
        if self._detokenizer is None:
            return len(token_ids), "", None
        is_silent_end = finish_reason is FinishReason.STOP and not self._params.include_stop_str_in_output
        visible = token_ids[:-1] if is_silent_end else token_ids
        if self._stops is None:
            text = self._detokenizer.feed(visible)
            return len(token_ids), text + (self._detokenizer.flush() if finish_reason else ""), None
        parts = []
        for index, token_id in enumerate(visible):
            self._num_tokens += 1
            may_stop = self._num_tokens > self._params.min_tokens
            found = self._stops.feed(self._detokenizer.feed((token_id,)), may_stop=may_stop)
            parts.append(found.text)
            if found.stop is not None:
                return index + 1, "".join(parts), found.stop
        if finish_reason is not None:
            found = self._stops.feed(self._detokenizer.flush(), may_stop=self._num_tokens > self._params.min_tokens)
            parts += [found.text, self._stops.flush() if found.stop is None else ""]
            return len(token_ids), "".join(parts), found.stop
        return len(token_ids), "".join(parts), None


def decode_logprobs(tokenizer: Tokenizer, positions: Sequence[TokenLogprobs]) -> list[dict[int, Logprob]]:
    """vLLM's shape: per position, token id -> logprob, rank and text; the chosen token first, then the likeliest."""
    decoded = []
    for position in positions:
        ids, values = position.token_ids, position.logprobs
        table = {ids[0]: Logprob(values[0], position.rank, tokenizer.token_str(ids[0]))}
        for rank, (token_id, value) in enumerate(zip(ids[1:], values[1:]), start=1):
            if token_id not in table:
                table[token_id] = Logprob(value, rank if position.is_ranked else None, tokenizer.token_str(token_id))
        decoded.append(table)
    return decoded
