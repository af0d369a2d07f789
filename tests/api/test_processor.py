"""Prompts and parameters on their way in."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pagoda.api.processor import Processor, sampling_defaults
from pagoda.base.errors import InvalidRequest
from pagoda.base.types import SamplingParams, StructuredOutputsParams
from tests.api.fakes import EOS, VOCAB, FakeEngine


def processor(**generation_config: Any) -> Processor:
    engine = FakeEngine(generation_config=generation_config)
    return Processor(
        engine.config, engine.facts, engine.front.tokenizer, generation_config=generation_config, eos_token_ids=[EOS]
    )


def ids(text: str) -> list[int]:
    return processor().tokenizer.encode(text)


def test_the_four_shapes_of_a_prompt() -> None:
    p, params = processor(), SamplingParams()
    for prompt, text in (("ab", "ab"), (ids("ab"), None), ({"prompt": "ab"}, "ab"), ({"prompt_token_ids": ids("ab")}, None),
                         ({"prompt_token_ids": ids("ab"), "prompt": "said"}, "said")):
        request, said = p.process(prompt, params, "r")
        assert (request.prompt_token_ids, said) == (ids("ab"), text)
    assert p.process({"prompt": "ab", "cache_salt": "s"}, params, "r").request.cache_salt == "s"


@pytest.mark.parametrize("prompt", [{"promt": "ab"}, {}, {"prompt": 3}, 7, [1, "a"], {"prompt_token_ids": ["a"]}])
def test_other_shapes_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        processor().process(prompt, SamplingParams(), "r")
    assert caught.value.param == "prompt"


def test_generation_config_gives_the_defaults_and_more_eos_ids() -> None:
    p = processor(temperature=0.2, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1, max_new_tokens=33, eos_token_id=[5, EOS], do_sample=True)
    params = p.default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty, params.max_tokens) == (
        0.2, 0.9, 40, 0.1, 1.1, 33)
    assert p.process("a", None, "r").request.params == params
    assert p.process("a", None, "r").request.eos_token_ids == [EOS, 5]
    assert p.process("a", SamplingParams(), "r").request.params.temperature == 1.0, "given parameters are taken as they are"
    assert sampling_defaults({"temperature": None, "max_length": 20}) == {}


def test_max_tokens_none_is_the_rest_of_the_context() -> None:
    given = SamplingParams(max_tokens=None)
    assert processor().process("a" * 50, given, "r").request.params.max_tokens == 150
    assert given.max_tokens is None


def test_prompt_longer_than_the_context_is_refused_with_numbers() -> None:
    with pytest.raises(InvalidRequest, match=r"200 tokens.*has 200.*at most 199") as caught:
        processor().process("a" * 200, SamplingParams(), "r")
    assert caught.value.code == "context_length_exceeded"
    processor().process("a" * 199, SamplingParams(), "r")


def test_truncation_keeps_the_end() -> None:
    p = processor()
    text = "".join(chr(33 + i % 90) for i in range(300))
    assert p.process(text, SamplingParams(truncate_prompt_tokens=7), "r").request.prompt_token_ids == ids(text[-7:])
    kept = p.process(text, SamplingParams(truncate_prompt_tokens=-1, max_tokens=20), "r").request.prompt_token_ids
    assert kept == ids(text[-180:]), "room is left for max_tokens"
    with pytest.raises(InvalidRequest, match="201"):
        p.process(text, SamplingParams(truncate_prompt_tokens=201), "r")


def test_bad_words_are_spelled_with_and_without_a_space() -> None:
    params = SamplingParams(bad_words=["no", " no", "x"], bad_words_token_ids=[[3]])
    request = processor().process("a", params, "r").request
    assert request.params.bad_words_token_ids == [[3], ids("no"), ids(" no"), ids("x"), ids(" x")]
    with pytest.raises(InvalidRequest, match="bad_words"):
        processor().process("a", SamplingParams(bad_words=["  "]), "r")


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [3, VOCAB]}, "allowed_token_ids"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
    ],
)
def test_parameters_outside_the_model_are_refused(params: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        processor().process("a", SamplingParams(**params), "r")
    assert caught.value.param == param


def test_max_logprobs_minus_one_allows_the_whole_vocabulary() -> None:
    engine = FakeEngine(max_logprobs=-1)
    p = Processor(engine.config, engine.facts, engine.front.tokenizer)
    assert p.process("a", SamplingParams(logprobs=-1), "r").request.params.logprobs == -1


def test_dry_breakers_become_the_tokens_that_have_them() -> None:
    p = processor()
    texts = {i: p.tokenizer.token_str(i) for i in range(min(VOCAB, p.tokenizer.vocab_size))}
    found = p.process("a", SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=["b"]), "r").request.params.dry_breaker_ids
    assert found == [i for i, text in texts.items() if "b" in text] != []
    default = p.process("a", SamplingParams(dry_multiplier=1.0), "r").request.params.dry_breaker_ids
    assert default == [i for i, text in texts.items() if any(c in text for c in '\n:"*')] != []
    assert p.process("a", SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=[]), "r").request.params.dry_breaker_ids == []
    several = p.process("a", SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=["xyz"]), "r").request.params.dry_breaker_ids
    assert several == ids("z"), "a breaker that no token has counts by its last token"
    assert p.process("a", SamplingParams(), "r").request.params.dry_breaker_ids is None


def test_the_engines_logprobs_mode_holds_where_the_request_says_nothing() -> None:
    engine = FakeEngine()
    config = replace(engine.config, model=replace(engine.config.model, logprobs_mode="raw_logits"))
    p = Processor(config, engine.facts, engine.front.tokenizer, eos_token_ids=[EOS])
    assert p.process("a", SamplingParams(), "r").request.params.logprobs_mode == "raw_logits"
    own = SamplingParams(logprobs_mode="processed_logprobs")
    assert p.process("a", own, "r").request.params.logprobs_mode == "processed_logprobs"


def test_banned_strings_become_a_grammar() -> None:
    request = processor().process("a", SamplingParams(banned_strings=["a b", "c"]), "r").request
    assert request.grammar is not None and request.params.banned_strings is None
    beside = SamplingParams(banned_strings=["a b", "c"], structured_outputs=StructuredOutputsParams(regex="a"))
    joint = processor().process("a", beside, "r").request.grammar
    assert joint is not None and request.grammar in json.loads(joint)["all"] and len(json.loads(joint)["all"]) == 2
