"""TextState: what a client reads of one sample."""

from __future__ import annotations

import pytest

from pagoda.base.types import FinishReason, SamplingParams, TokenLogprobs
from pagoda.text.output import TextState
from pagoda.text.tokenizer import Tokenizer
from tests.text.test_detokenize import byte_level_tokenizer

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.token_to_id("<end>")
assert END is not None


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def state(tokenizer: Tokenizer = TOKENIZER, **params: object) -> TextState:
    return TextState(tokenizer, SamplingParams(**params), [])


def test_plain_stream_and_end_token() -> None:
    stream = state()
    assert stream.push(ids_of("he")).text == "he"
    delta = stream.push([*ids_of("y"), END], None, FinishReason.STOP)
    assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == (
        "y",
        [*ids_of("y"), END],
        FinishReason.STOP,
        None,
    )
    with pytest.raises(AssertionError):
        stream.push([1])


@pytest.mark.parametrize("include", [False, True])
def test_text_of_a_stop_token(include: bool) -> None:
    token = ids_of("!")
    delta = state(include_stop_str_in_output=include).push(ids_of("hi") + token, None, FinishReason.STOP, token[0])
    assert (delta.text, delta.stop_reason) == ("hi!" if include else "hi", token[0])


def test_length_flushes_what_is_held() -> None:
    stream = state(stop=["stop"])
    assert stream.push(ids_of("a st")).text == "a "
    assert stream.push(ids_of("o"), None, FinishReason.LENGTH).text == "sto"
    half = ids_of("\u00e9")[:1]
    assert state().push(half, None, FinishReason.LENGTH).text == "\ufffd"


def test_stop_string_cuts_tokens_and_logprobs() -> None:
    ids = ids_of("one two three")
    logprobs = [TokenLogprobs([token_id, END, token_id], [-1.0, -0.5, -1.0], 2) for token_id in ids]
    delta = state(stop=[" two"]).push(ids, logprobs, FinishReason.LENGTH)
    assert (delta.text, delta.stop_reason, delta.finish_reason) == ("one", " two", FinishReason.STOP)
    assert len(delta.token_ids) == 7 and delta.logprobs is not None and len(delta.logprobs) == 7
    first = delta.logprobs[0]
    assert list(first) == [ids[0], END]
    assert (first[ids[0]].rank, first[ids[0]].decoded_token) == (2, "o")
    assert (first[END].rank, first[END].logprob, first[END].decoded_token) == (1, -0.5, "<end>")


def test_min_tokens_shields_stop_strings() -> None:
    stream = state(stop=["ab"], min_tokens=3, max_tokens=20)
    assert stream.push(ids_of("ab")).stop_reason is None
    delta = stream.push(ids_of("xab"))
    assert (delta.text, delta.stop_reason) == ("x", "ab")


def test_without_detokenizing() -> None:
    delta = state(detokenize=False).push(ids_of("abc"), None, FinishReason.LENGTH)
    assert (delta.text, len(delta.token_ids)) == ("", 3)
