"""The official client, unmodified, over a real socket."""

from __future__ import annotations

import openai
import pytest

from tests.serve.fakes import MODEL, Rig

REPLY = "Hello wörld, this is it."
MESSAGES = [{"role": "user", "content": "hi"}]


def test_models(client: openai.OpenAI) -> None:
    cards = client.models.list().data
    assert [card.id for card in cards] == [MODEL, "alias"]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    assert answer.object == "chat.completion" and answer.model == MODEL and answer.id.startswith("chatcmpl-")
    num_prompt = len("user: hi\nassistant: ")
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == len(REPLY.encode()) + 1
    assert answer.usage.total_tokens == num_prompt + len(REPLY.encode()) + 1
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == REPLY
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(REPLY.encode()) + 1
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_chat_stream_with_running_usage(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == len(REPLY.encode()) + 1


def test_samples(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3)
    assert [(c.index, c.message.content) for c in answer.choices] == [(0, REPLY), (1, "Hello 1"), (2, "Hello 2")]
    texts = {0: "", 1: "", 2: ""}
    ends: list[int] = []
    for chunk in client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends += [choice.index] if choice.finish_reason else []
    assert texts == {0: REPLY, 1: "Hello 1", 2: "Hello 2"} and sorted(ends) == [0, 1, 2]


@pytest.mark.parametrize("is_stream", [False, True])
def test_stop_string(client: openai.OpenAI, is_stream: bool) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, stop=["ld, t", "zzz"], stream=is_stream)
    if is_stream:
        chunks = list(answer)
        text, last = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0]
    else:
        last = answer.choices[0]
        text = last.message.content
    assert text == "Hello wör" and last.finish_reason == "stop" and last.stop_reason == "ld, t"


def test_length(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 9}):
        choice = client.chat.completions.create(model=MODEL, messages=MESSAGES, **limit).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Hello", "length")


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=9)
    content = answer.choices[0].logprobs.content
    assert len(content) == 9
    assert content[0].token == "H" and content[0].bytes == [72] and content[0].logprob == -0.25
    assert [top.logprob for top in content[0].top_logprobs] == [-0.25, -1.25]
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == "Hello wö"
    plain = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, max_tokens=2)
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content] == [[], []]
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=1, stream=True)
    entries = [e for c in stream for e in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    assert len(entries) == len(REPLY.encode()) + 1, "no token's logprob is lost while a character is incomplete"


def test_extra_fields_reach_the_engine(client: openai.OpenAI, rig: Rig) -> None:
    extra = {
        "top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5, "stop_token_ids": [3], "ignore_eos": True, "min_tokens": 2,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "allowed_token_ids": [1, 2], "bad_words": ["x"],
        "truncate_prompt_tokens": 9, "include_stop_str_in_output": True, "cache_salt": "s", "request_id": "extra",
        "chat_template_kwargs": {"thinking": True}, "documents": [{"text": "d"}],
    }  # fmt: skip
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0.5, top_p=0.75, seed=5, frequency_penalty=0.5, presence_penalty=-0.5,
        logit_bias={"5": 2, "6": -500}, max_tokens=3, extra_body=extra,
    )  # fmt: skip
    assert answer.id == "chatcmpl-extra"
    engine_id = next(key for key in rig.engine.params if key.startswith("chatcmpl-extra"))
    params = rig.engine.params[engine_id]
    for name in extra.keys() - {"cache_salt", "request_id", "chat_template_kwargs", "documents"}:
        assert getattr(params, name) == extra[name], name
    assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.75, 5, 3)
    assert params.logit_bias == {5: 2.0, 6: -100.0}
    assert rig.engine.salts[engine_id] == "s"
    assert rig.template.last["thinking"] is True and rig.template.last["documents"] == [{"text": "d"}]


def test_continue_and_echo(client: openai.OpenAI, rig: Rig) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    extra = {"continue_final_message": True, "echo": True, "return_token_ids": True}
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2, extra_body=extra)
    assert answer.choices[0].message.content == "Well, He"
    assert rig.template.last["continue_final_message"] is True and rig.template.last["add_generation_prompt"] is False
    assert len(answer.choices[0].token_ids) == 2 and len(answer.prompt_token_ids) == answer.usage.prompt_tokens


def test_content_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    answer = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert answer.usage.prompt_tokens == len("user: hi\nassistant: ")


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Say", max_tokens=100)
    assert answer.object == "text_completion" and answer.choices[0].text == REPLY
    assert client.completions.create(model=MODEL, prompt="Say").usage.completion_tokens == 16


def test_completion_prompt_shapes(client: openai.OpenAI) -> None:
    many = client.completions.create(model=MODEL, prompt=["a", "bc"], n=2, max_tokens=3, echo=True)
    assert [(c.index, c.text) for c in many.choices] == [(0, "aHel"), (1, "aHel"), (2, "bcHel"), (3, "bcHel")]
    assert many.usage.prompt_tokens == 3 and many.usage.completion_tokens == 12
    tokens = client.completions.create(model=MODEL, prompt=[65, 66, 67], max_tokens=1)
    assert tokens.usage.prompt_tokens == 3 and len(tokens.choices) == 1
    lists = client.completions.create(model=MODEL, prompt=[[65], [66, 67]], max_tokens=1)
    assert lists.usage.prompt_tokens == 3 and len(lists.choices) == 2


def test_completion_stream(client: openai.OpenAI) -> None:
    texts = {0: "", 1: "", 2: "", 3: ""}
    usage = None
    stream = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, echo=True, stream=True, max_tokens=50, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "a" + REPLY, 1: "aHello 1", 2: "b" + REPLY, 3: "bHello 1"}
    assert usage.prompt_tokens == 2


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=2, logprobs=1, echo=True)
    found = answer.choices[0].logprobs
    assert found.tokens == ["a", "b", "c", "H", "e"] and found.text_offset == [0, 1, 2, 3, 4]
    assert found.token_logprobs == [None, -0.5, -0.5, -0.25, -0.25]
    assert found.top_logprobs[0] is None and found.top_logprobs[3] == {"H": -0.25}
    scored = client.completions.create(model=MODEL, prompt="abc", max_tokens=0, logprobs=1, echo=True)
    assert scored.choices[0].text == "abc" and scored.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert scored.usage.completion_tokens == 0
    named = client.completions.create(model=MODEL, prompt="a", max_tokens=1, logprobs=0, extra_body={"return_tokens_as_token_ids": True})
    assert named.choices[0].logprobs.tokens[0].startswith("token_id:")


def test_every_streamed_sample_echoes_the_prompt_with_logprobs(client: openai.OpenAI) -> None:
    tokens: dict[int, list[str]] = {0: [], 1: []}
    for chunk in client.completions.create(model=MODEL, prompt="abc", n=2, echo=True, logprobs=0, max_tokens=2, stream=True):
        for choice in chunk.choices:
            tokens[choice.index] += choice.logprobs.tokens
    assert tokens == {0: ["a", "b", "c", "H", "e"], 1: ["a", "b", "c", "H", "e"]}


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=1, extra_body={"prompt_logprobs": 1})
    found = answer.choices[0].prompt_logprobs
    assert found[0] is None and len(found) == 3 and next(iter(found[1].values()))["logprob"] == -0.5


def test_best_of(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", n=1, best_of=3, max_tokens=50)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "Hello 1")], "sample 1 has the best log probability per token"


def test_tools_are_told_to_be_text(rig: Rig, client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, tools=tools)
    assert "tool calls come as text" in raw.headers["x-pagoda-warning"]
    assert rig.template.last["tools"] == tools


async def test_async_client(rig: Rig) -> None:
    async with openai.AsyncOpenAI(base_url=rig.base_url + "/v1", api_key="none", timeout=10) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        assert answer.choices[0].message.content == REPLY
        stream = await client.completions.create(model=MODEL, prompt="x", stream=True, max_tokens=50)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == REPLY


def test_errors_have_openai_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=[])
    assert bad.value.param == "messages"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=MESSAGES)
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model=MODEL, prompt="!full")
    assert full.value.response.headers["retry-after"] == "1"
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(model=MODEL, prompt="!fail", stream=True))
