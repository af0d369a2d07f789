"""Beam search against exhaustive search, on a model small enough to enumerate; and through the two drivers."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from pagoda.api.async_engine import AsyncEngine
from pagoda.api.beam import BeamSearch, check_beam_params
from pagoda.api.llm import LLM
from pagoda.api.processor import Processor
from pagoda.base.errors import InvalidRequest, RequestFailed
from pagoda.base.types import (
    CompletionOutput,
    GenerateRequest,
    Logprob,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from pagoda.engine.client import ThreadClient
from tests.api.fakes import EOS, FakeEngine, byte_tokenizer

END = 3  # of the tiny model: tokens 0, 1, 2 and this
TOKENIZER = byte_tokenizer()


def table(ids: tuple[int, ...]) -> dict[int, Logprob]:
    """A fixed random distribution over four tokens after `ids`."""
    rng = random.Random(str(ids))
    weights = [rng.random() ** 2 + 1e-3 for _ in range(4)]
    return {i: Logprob(math.log(w / sum(weights))) for i, w in enumerate(weights)}


def search(**params: Any) -> list[CompletionOutput]:
    given = SamplingParams(use_beam_search=True, detokenize=False, **params)
    beams = BeamSearch(GenerateRequest(request_id="r", prompt_token_ids=[9], params=given, eos_token_ids=[END]), 100)
    while not beams.is_finished:
        answers = [
            RequestOutput(
                request_id="s", prompt=None, prompt_token_ids=ids, finished=True,
                outputs=[CompletionOutput(index=0, text="", token_ids=[0], logprobs=[table(tuple(ids[1:]))])],
            )
            for ids in beams.prompts()
        ]  # fmt: skip
        beams.advance(answers)
    return beams.output(None, TOKENIZER).outputs


def best_of_all(length: int, penalty: float, *, min_tokens: int = 0) -> list[tuple[float, tuple[int, ...]]]:
    """Every text of up to `length` tokens, by its score."""
    found = []
    for size in range(1, length + 1):
        for ids in itertools.product(range(4), repeat=size):
            is_ended = ids[-1] == END
            if END in ids[:-1] or not (is_ended or size == length) or (is_ended and size <= min_tokens):
                continue
            logprob = sum(table(ids[:i])[token].logprob for i, token in enumerate(ids))
            found.append((logprob / max(1, size - is_ended) ** penalty, ids))
    return sorted(found, key=lambda item: (-item[0], item[1]))


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("min_tokens", [0, 2])
def test_a_wide_beam_finds_the_best(penalty: float, min_tokens: int) -> None:
    expected = best_of_all(4, penalty, min_tokens=min_tokens)
    outputs = search(n=256, max_tokens=4, length_penalty=penalty, min_tokens=min_tokens)
    assert [tuple(o.token_ids) for o in outputs] == [ids for _, ids in expected]
    for output, (_, ids) in zip(outputs, expected, strict=True):
        assert output.cumulative_logprob == pytest.approx(sum(table(ids[:i])[t].logprob for i, t in enumerate(ids)))
        assert output.finish_reason == ("stop" if ids[-1] == END else "length")


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_narrow_beam_is_the_textbook_one(penalty: float) -> None:
    """Ending a search early loses nothing: the same as going on to the end."""
    width, length = 3, 6
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for size in range(1, length + 1):
        grown = []
        for logprob, ids in live:
            ranked = sorted(table(ids).items(), key=lambda item: (-item[1].logprob, item[0]))[: 2 * width]
            grown += [(logprob + entry.logprob, (*ids, token)) for token, entry in ranked]
        done += [one for one in grown if one[1][-1] == END or size == length]
        live = sorted((one for one in grown if one[1][-1] != END), key=lambda one: (-one[0] / size**penalty, one[1]))[:width]
    ranked_done = sorted(done, key=lambda one: (-one[0] / max(1, len(one[1]) - (one[1][-1] == END)) ** penalty, one[1]))
    assert [tuple(o.token_ids) for o in search(n=width, max_tokens=length, length_penalty=penalty)] == [ids for _, ids in ranked_done[:width]]


def test_ends_are_told_apart() -> None:
    assert {o.finish_reason for o in search(n=40, max_tokens=2, ignore_eos=True)} == {"length"}
    stopped = [o for o in search(n=40, max_tokens=3, stop_token_ids=[2]) if o.token_ids[-1] == 2]
    assert stopped and {(o.finish_reason, o.stop_reason) for o in stopped} == {("stop", 2)}
    with_logprobs = search(n=2, max_tokens=3, logprobs=1)[0]
    assert with_logprobs.logprobs is not None and len(with_logprobs.logprobs) == len(with_logprobs.token_ids)


@pytest.mark.parametrize("bad", [{"stop": "x"}, {"logit_bias": {1: 2.0}}, {"presence_penalty": 1.0}, {"banned_strings": ["a"]}, {"mirostat_mode": 2}])
def test_what_changes_probabilities_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="beam search") as caught:
        check_beam_params(SamplingParams(use_beam_search=True, **bad))
    assert caught.value.param == next(iter(bad))


def test_offline() -> None:
    with_beams = LLM(engine=FakeEngine(max_logprobs=20))
    found = with_beams.beam_search(["ab", "c"], beam_width=2, max_tokens=4)
    assert [len(output.outputs) for output in found] == [2, 2]
    assert found[0].outputs[0].token_ids[0] == TOKENIZER.encode("A")[0], "the script's likeliest"
    mixed = with_beams.generate(
        ["ab", "ab"], [SamplingParams(seed=1, max_tokens=3), SamplingParams(use_beam_search=True, n=2, temperature=0, max_tokens=3)], use_tqdm=False
    )
    assert [len(output.outputs) for output in mixed] == [1, 2]
    with pytest.raises(InvalidRequest, match="22 logprobs"):
        with_beams.beam_search("ab", beam_width=11, max_tokens=4)


async def test_asynchronous() -> None:
    fake = FakeEngine(max_logprobs=20)
    engine = AsyncEngine(ThreadClient(fake.core), Processor(fake.config, fake.facts, fake.front.tokenizer, eos_token_ids=[EOS]), on_shutdown=fake.close)
    params = SamplingParams(use_beam_search=True, n=2, max_tokens=4, output_kind=RequestOutputKind.FINAL_ONLY)
    try:
        outputs = [output async for output in engine.generate("ab", params, "r")]
        offline = LLM(engine=FakeEngine(max_logprobs=20)).beam_search("ab", beam_width=2, max_tokens=4)
        assert len(outputs) == 1 and outputs[0].finished
        metrics = outputs[0].metrics
        assert metrics is not None and 0 < metrics.arrival_time <= metrics.first_token_time < metrics.last_token_time
        assert [o.token_ids for o in outputs[0].outputs] == [o.token_ids for o in offline[0].outputs]
        fake.executor.bug = RuntimeError("no luck")
        with pytest.raises(RequestFailed, match="no luck"):
            async for _ in engine.generate("ab", params, "r"):
                pass
        with pytest.raises(InvalidRequest, match="streamed"):
            async for _ in engine.generate("ab", params.clone(output_kind=RequestOutputKind.DELTA), "r"):
                pass
        assert not engine._readers and not engine._searches
    finally:
        await engine.shutdown()
