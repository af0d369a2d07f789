"""Structured output on the default model: the text fits, together with everything else a request can ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagoda import LLM, SamplingParams
from pagoda.base.types import RequestOutput, StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
QUESTION = [{"role": "user", "content": "Describe Ann, who is 31 and likes red."}]


@pytest.fixture(scope="module")
def llm(default_model: Path) -> Iterator[LLM]:
    made = LLM(str(default_model), kv_cache_memory_bytes=64 << 20, max_model_len=512)
    yield made
    made.close()


def ask(llm: LLM, structured: dict[str, Any] | None, **params: Any) -> RequestOutput:
    wanted = None if structured is None else StructuredOutputsParams(**structured)
    given = {"temperature": 0, "max_tokens": 100, "structured_outputs": wanted, **params}
    return llm.chat(QUESTION, SamplingParams(**given), use_tqdm=False)[0]


def check(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["name", "age", "tags"] and 0 <= found["age"] <= 120 and set(found["tags"]) <= {"red", "green", "blue"}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "seed": 5, "n": 4},
        {"temperature": 0.9, "seed": 1, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
        {"logprobs": 3, "min_tokens": 90, "ignore_eos": True},
        {"allowed_token_ids": [40], "temperature": 1.0, "seed": 2},  # no token is left by both: the grammar wins
    ],
)
def test_json_with_every_other_parameter(llm: LLM, params: dict[str, Any]) -> None:
    output = ask(llm, {"json": SCHEMA}, **params)
    assert len(output.outputs) == params.get("n", 1)
    for sample in output.outputs:
        assert sample.finish_reason == "stop"
        check(sample.text)
        if "logprobs" in params:
            assert sample.logprobs is not None and len(sample.logprobs) == len(sample.token_ids)


def test_stop_strings_and_length_cut_it(llm: LLM) -> None:
    whole = ask(llm, {"json": SCHEMA}).outputs[0].text
    cut = ask(llm, {"json": SCHEMA}, stop=['"age"']).outputs[0]
    assert cut.text == whole[: whole.index('"age"')] and cut.stop_reason == '"age"'
    short = ask(llm, {"json": SCHEMA}, max_tokens=5).outputs[0]
    assert whole.startswith(short.text) and short.finish_reason == "length"


def test_regex_choice_and_grammar(llm: LLM) -> None:
    assert re.fullmatch(r"\d{3}-[a-f]{2}", ask(llm, {"regex": r"\d{3}-[a-f]{2}"}).outputs[0].text)
    assert ask(llm, {"choice": ["Paris", "Rome"]}).outputs[0].text in ("Paris", "Rome")
    assert re.fullmatch(r"say (a|b)+\.", ask(llm, {"grammar": 'root ::= "say " [ab] [ab]? "."'}).outputs[0].text)


def test_a_grammar_that_allows_everything_changes_nothing(llm: LLM) -> None:
    free = ask(llm, None, logprobs=2, max_tokens=30).outputs[0]
    held = ask(llm, {"regex": r"(.|\n)*"}, logprobs=2, max_tokens=30).outputs[0]
    assert (held.text, held.token_ids, held.logprobs) == (free.text, free.token_ids, free.logprobs)


def test_jumping_forward_changes_no_token(llm: LLM) -> None:
    core = llm._engine.core
    params = [
        SamplingParams(temperature=0.9 * (i % 2), seed=i, max_tokens=70, structured_outputs=StructuredOutputsParams(json=SCHEMA), stop=stop)
        for i, stop in enumerate([None, None, ["tags"], None, ["31"], None])
    ]
    found, num_steps = [], []
    for jumps in (False, True):
        core._jumps_forward = jumps
        before = core._scheduler._num_steps
        outputs = llm.chat([QUESTION] * len(params), params, use_tqdm=False)
        found.append([(sample.text, sample.token_ids, sample.finish_reason) for output in outputs for sample in output.outputs])
        num_steps.append(core._scheduler._num_steps - before)
    assert found[0] == found[1]
    assert num_steps[1] < num_steps[0]


def test_preemption_neighbours_and_prefix_hits_change_nothing(default_model: Path, llm: LLM) -> None:
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=60, structured_outputs=StructuredOutputsParams(json=SCHEMA) if i % 3 else None)
        for i in range(9)
    ]
    alone = [llm.chat(QUESTION, each, use_tqdm=False)[0].outputs[0].token_ids for each in params]
    small = LLM(str(default_model), num_gpu_blocks_override=22, max_model_len=256, max_num_seqs=9)
    try:
        together = [output.outputs[0].token_ids for output in small.chat([QUESTION] * 9, params, use_tqdm=False)]
        assert small._engine.core.stats().num_preemptions > 0
    finally:
        small.close()
    assert together == alone
