"""Fields that came later: repetition detection, thinking budgets, chosen logprobs, the side that is cut, banned strings beside a structure."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pagoda.api.processor import Processor
from pagoda.base.errors import InvalidRequest
from pagoda.base.plan import NOT_FINITE, StepResult
from pagoda.base.types import (
    CompletionOutput,
    FinishReason,
    GenerateRequest,
    RepetitionDetection,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
    Thinking,
    TokenLogprobs,
)
from pagoda.engine.request import Request
from pagoda.serve import openai_chat
from pagoda.serve.context import ModelContext
from pagoda.serve.metrics import ServerMetrics
from pagoda.structured.banned import banned_grammar
from pagoda.structured.matcher import GrammarCompiler
from pagoda.structured.translate import both, translate
from pagoda.text.output import decode_logprobs
from pagoda.worker.logits.step import RowContext
from pagoda.worker.logits.thinking import ThinkingBudget, forced_token
from pagoda.worker.sampler import top_logprobs
from tests.engine.harness import Harness
from tests.serve.fakes import MODEL, PlainTemplate, byte_tokenizer

THINKING = Thinking([7], [8, 9], is_open=False)


def thinking_tokenizer() -> Any:
    backend = byte_tokenizer().backend
    backend.add_special_tokens(["<think>", "</think>"])
    return type(byte_tokenizer())(backend, special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"}, eos_ids=[257])


@pytest.fixture(scope="module")
def context() -> ModelContext:
    return ModelContext(
        model_names=(MODEL,), model_path="", max_model_len=512, max_logprobs=20, tokenizer=thinking_tokenizer(), template=PlainTemplate(), reasoning_format="qwen3"
    )  # fmt: skip


def chat(context: ModelContext, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    return openai_chat.parse(json.dumps(body).encode(), None, context)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([1, 2, 1, 2, 1, 2], True), ([5, 1, 1, 1], True), ([1, 2, 3, 1, 2, 3], False), ([1, 2, 1, 2, 2], False), ([4, 4], False),
        ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], True), ([1, 2, 3, 4] * 3, False),
    ],
)  # fmt: skip
def test_repetition_is_found(tokens: list[int], found: bool) -> None:
    """Patterns of 1 to 3 tokens, three times, behind the prompt."""
    rule = RepetitionDetection(max_pattern_size=3, min_count=3)
    assert rule.finds([0, *tokens], 1) is found
    assert not rule.finds([1, 1, 1], 1), "the prompt does not count"


@pytest.mark.parametrize("wrong", [{"max_pattern_size": 0}, {"max_pattern_size": 2, "min_pattern_size": 3}, {"max_pattern_size": 2, "min_count": 1}])
def test_repetition_rules_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest):
        RepetitionDetection(**{"min_count": 3, **wrong})


@pytest.mark.parametrize(
    ("output", "budget", "token"),
    [
        ([], 2, None), ([7], 2, None), ([7, 1], 2, None), ([7, 1, 2], 2, 8), ([7, 1, 2, 8], 2, 9), ([7, 1, 2, 8, 9], 2, None),
        ([7, 8, 9, 1, 2], 2, None), ([1, 2, 3], 2, None), ([7, 1, 8], 2, 8), ([7], 0, 8), ([7, 8], 0, 9), ([7, 8, 8], 1, 9),
    ],
)  # fmt: skip
def test_a_budget_ends_the_reasoning(output: list[int], budget: int, token: int | None) -> None:
    assert forced_token(np.array(output, np.int32), THINKING, budget) == token


def test_the_forced_token_is_the_only_one_left() -> None:
    params = SamplingParams(thinking_token_budget=1, thinking=Thinking([], [3], is_open=True))
    assert ThinkingBudget().wants(params) and not params.is_drawn_on_device and not ThinkingBudget().wants(SamplingParams(thinking_token_budget=-1))
    logits = np.zeros(5, np.float32)
    ThinkingBudget().apply(logits, RowContext(params, np.array([9, 9, 1]), 2, []))
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [3]


def test_budgets_know_the_model(context: ModelContext) -> None:
    start, end = (context.tokenizer.token_to_id(mark) for mark in ("<think>", "</think>"))
    assert chat(context, thinking_token_budget=5).params.thinking == Thinking([start], [end], is_open=False)
    assert chat(context).params.thinking is None


def test_reasoning_tokens_are_the_same_streamed_and_whole(context: ModelContext) -> None:
    tokenizer = context.tokenizer
    ids = tokenizer.encode("<think>abc</think>ok", add_special_tokens=False)
    pieces = ["<think>", "a", "b", "c", "</think>", "o", "k"]
    assert len(ids) == len(pieces)

    def output(i: int, j: int) -> RequestOutput:
        is_end = j == len(ids)
        sample = CompletionOutput(index=0, text="".join(pieces[i:j]), token_ids=ids[i:j], finish_reason="stop" if is_end else None)
        return RequestOutput(request_id="r", prompt="", prompt_token_ids=[1], outputs=[sample], finished=is_end)

    whole = json.loads(chat(context).renderer.whole([output(0, len(ids))]))
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3} and whole["choices"][0]["message"]["reasoning"] == "abc"
    renderer = chat(context, stream=True, stream_options={"include_usage": True}).renderer
    for i in range(len(ids)):
        renderer.delta(0, output(i, i + 1))
    usage = json.loads(renderer.closing().split(b"\n\n")[0].removeprefix(b"data: "))["usage"]
    assert usage == whole["usage"]


def test_logprobs_of_chosen_tokens() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    found = top_logprobs(logits, 3, 0, 0.0, [2, 0])
    assert found.token_ids == [3, 2, 0] and found.rank == 1 and not found.is_ranked
    table = decode_logprobs(byte_tokenizer(), [found])[0]
    assert [entry.rank for entry in table.values()] == [1, None, None]
    assert decode_logprobs(byte_tokenizer(), [TokenLogprobs([3, 2], [-1.0, -2.0], 1)])[0][2].rank == 1
    with pytest.raises(InvalidRequest, match="needs `logprobs`"):
        SamplingParams(logprob_token_ids=[1])
    with pytest.raises(InvalidRequest, match="1 to 128"):
        SamplingParams(logprobs=0, logprob_token_ids=list(range(129)))


def test_chosen_logprobs_and_top_logprobs_exclude_each_other(context: ModelContext) -> None:
    assert chat(context, logprobs=True, logprob_token_ids=[1]).params.logprob_token_ids == [1]
    with pytest.raises(InvalidRequest, match="exclude each other"):
        chat(context, logprobs=True, top_logprobs=2, logprob_token_ids=[1])


def test_which_side_is_cut() -> None:
    cut = Processor._truncate
    for side, kept in (("left", [3, 4]), ("right", [1, 2])):
        params = SamplingParams(truncate_prompt_tokens=2, truncation_side=side)
        assert cut(type("P", (), {"max_model_len": 10})(), [1, 2, 3, 4], params) == kept  # type: ignore[arg-type]


def test_banned_strings_hold_inside_a_structure() -> None:
    tokenizer = byte_tokenizer()
    structure = translate(StructuredOutputsParams(regex="(cat|car|dog)s?")).grammar
    ban = translate(StructuredOutputsParams(grammar=banned_grammar(["cat"]))).grammar
    matcher = GrammarCompiler(lambda: tokenizer, 258).compile(both([structure, ban]), [257])

    def allowed() -> set[str]:
        bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")
        return {tokenizer.token_str(int(i)) for i in np.flatnonzero(bits)}

    assert allowed() == {"c", "d"} and matcher.forced() == []
    for letter in "ca":
        assert matcher.accept(tokenizer.token_to_id(letter)) is None
    assert allowed() == {"r"}, "cat is banned"
    twin = matcher.copy()
    assert matcher.accept(tokenizer.token_to_id("r")) is None and "<eos>" in allowed()
    assert twin.accept(tokenizer.token_to_id("x")) is not None


def test_where_nothing_is_left_the_structure_wins() -> None:
    tokenizer = byte_tokenizer()
    grammars = [translate(StructuredOutputsParams(choice=["cat"])).grammar, translate(StructuredOutputsParams(grammar=banned_grammar(["cat"]))).grammar]
    matcher = GrammarCompiler(lambda: tokenizer, 258).compile(both(grammars), [257])
    for letter in "cat":
        assert matcher.accept(tokenizer.token_to_id(letter)) is None
    assert matcher.mask().strip(b"\0"), "it may end"


def test_metrics_have_the_names() -> None:
    metrics = ServerMetrics()
    metrics.own.tool_calls["hermes", "calls"] = 2
    metrics.core.corrupted_requests = 1
    text = metrics.render().decode()
    assert 'vllm:tool_call_parser_invocations_total{engine="0",model_name="",parser="hermes",result="calls"} 2.0' in text
    assert 'vllm:corrupted_requests_total{engine="0",model_name=""} 1.0' in text


def test_the_core_ends_a_repetition_and_counts_bad_logits() -> None:
    rig = Harness()
    rule = RepetitionDetection(max_pattern_size=1, min_count=2)
    request = Request(
        request_id="r", index=0, sequence=0, prompt_token_ids=[5, 5], eos_token_ids=[], max_tokens_total=50, params=SamplingParams(repetition_detection=rule)
    )  # fmt: skip
    for token, end in ((5, None), (5, (FinishReason.REPETITION, "repetition_detected"))):
        request.token_ids.append(token)
        assert request.check_stop(token) == end
    rig.core.submit(GenerateRequest(request_id="x", prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=3)))
    sample, rig.executor.sample = rig.executor.sample, lambda number, masks=None: _broken(sample(number, masks))
    outputs = [output for _ in range(3) if rig.core.has_work() for output in rig.core.step()]
    assert outputs[-1].finish_reason is FinishReason.ERROR and rig.core.stats().corrupted_requests == 1


def _broken(result: StepResult) -> StepResult:
    for row in result.rows:
        row.error = NOT_FINITE
    return result
