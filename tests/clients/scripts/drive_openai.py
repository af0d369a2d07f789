"""openai-python: chats, streams, tools, structured output, logprobs, samples, stops, errors."""

from __future__ import annotations

import asyncio
import json

import openai
from pydantic import BaseModel, Field
from steps import BASE_URL, MODEL, PARIS, QUESTION, URL, WEATHER, run, step

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
ask = {"model": MODEL, "messages": PARIS, "temperature": 0}


@step
def models() -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


@step
def chat() -> None:
    answer = client.chat.completions.create(**ask)
    assert "Paris" in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@step
def stream() -> None:
    whole = client.chat.completions.create(**ask)
    parts = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert next(part.usage for part in parts if part.usage).completion_tokens == whole.usage.completion_tokens


@step
def stream_helper() -> None:
    with client.chat.completions.stream(**ask) as events:
        text = "".join(event.delta for event in events if event.type == "content.delta")
        final = events.get_final_completion()
    assert text == final.choices[0].message.content and "Paris" in text


@step
async def async_streams_together() -> None:
    async with openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0) as other:

        async def one() -> str:
            stream = await other.chat.completions.create(**ask, stream=True)
            return "".join([part.choices[0].delta.content or "" async for part in stream])

        texts = await asyncio.gather(*[one() for _ in range(8)])
    assert len(set(texts)) == 1 and "Paris" in texts[0]


@step
def completion() -> None:
    answer = client.completions.create(model=MODEL, prompt=["One, two,", "Red, green,"], max_tokens=4, temperature=0, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.choices[1].text.startswith("Red, green,")


@step
def tools() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        asked = {**ask, "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
        message = client.chat.completions.create(**asked).choices[0].message
        call = message.tool_calls[0]
        assert call.function.name == "get_weather" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        with client.chat.completions.stream(**asked) as events:
            streamed = events.get_final_completion().choices[0].message.tool_calls[0]
        assert streamed.function.arguments == call.function.arguments
        results = [*PARIS, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        assert client.chat.completions.create(**{**ask, "messages": results, "tools": [WEATHER], "max_tokens": 16}).choices[0].message


class City(BaseModel):
    name: str = Field(max_length=30)
    population: int = Field(ge=0, le=10**8)


@step
def json_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": WEATHER["function"]["parameters"], "strict": True}}
    answer = client.chat.completions.create(**ask, response_format=form)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")
    asked = {**ask, "messages": [{"role": "user", "content": 'Reply with exactly this JSON: {"city": "Paris"}'}]}
    answer = client.chat.completions.create(**asked, max_tokens=200, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@step
def parse() -> None:
    parsed = client.chat.completions.parse(**ask, response_format=City).choices[0].message.parsed
    assert isinstance(parsed, City)
    tool = openai.pydantic_function_tool(City)
    message = client.chat.completions.parse(**ask, tools=[tool], tool_choice="required", parallel_tool_calls=False).choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, City)


@step
def logprobs() -> None:
    chosen = client.chat.completions.create(**ask, logprobs=True, top_logprobs=3).choices[0]
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in chosen.logprobs.content)
    assert b"".join(bytes(token.bytes) for token in chosen.logprobs.content).decode().startswith(chosen.message.content)
    text = client.completions.create(model=MODEL, prompt=QUESTION, max_tokens=3, logprobs=2, extra_body={"ignore_eos": True}).choices[0].logprobs
    assert len(text.tokens) == len(text.token_logprobs) == len(text.top_logprobs) == len(text.text_offset) == 3


@step
def n_and_seed() -> None:
    texts = [
        [choice.message.content for choice in client.chat.completions.create(**{**ask, "temperature": 1}, n=3, seed=seed, max_tokens=12).choices]
        for seed in (1, 1, 2)
    ]
    assert len(texts[0]) == 3 and texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1


@step
def stop() -> None:
    choice = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", stop=["7"], max_tokens=40, temperature=0).choices[0]
    assert "7" not in choice.text and choice.finish_reason == "stop"


@step
def extra_body() -> None:
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=8, extra_body={"top_k": 1, "structured_outputs": {"regex": "[0-9]{4}"}})
    assert len(answer.choices[0].text) == 4 and answer.choices[0].text.isdigit()


@step
def errors() -> None:
    for wrong, kind in (
        (lambda: client.chat.completions.create(**{**ask, "model": "other"}), openai.NotFoundError),
        (lambda: client.chat.completions.create(**ask, extra_body={"n": "two"}), openai.BadRequestError),
        (lambda: client.completions.create(model=MODEL, prompt="word " * 10**4), openai.BadRequestError),
        (lambda: client.embeddings.create(model=MODEL, input="x"), openai.NotFoundError),
    ):
        try:
            wrong()
        except kind as error:
            assert error.body["message"] and error.request_id
        else:
            raise AssertionError(f"{kind.__name__} was not raised")


@step
def leaving_a_stream() -> None:
    stream = client.chat.completions.create(**{**ask, "messages": [{"role": "user", "content": "Tell a long story."}]}, stream=True)
    next(iter(stream))
    stream.close()
    assert openai.OpenAI(base_url=BASE_URL + "/v1/", api_key="none").chat.completions.create(**ask, max_tokens=1).choices


run("openai")
