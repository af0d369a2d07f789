"""LiteLLM: both of its providers for such a server, `openai/` and `hosted_vllm/`; sync, async, and its router."""

from __future__ import annotations

import json

import litellm
from pydantic import BaseModel, Field
from steps import BASE_URL, MODEL, PARIS, URL, WEATHER, run, step

PROVIDERS = ("openai", "hosted_vllm")
ask = {"messages": PARIS, "api_base": URL, "api_key": "none", "temperature": 0, "num_retries": 0}


@step
def chat() -> None:
    for provider in PROVIDERS:
        answer = litellm.completion(model=f"{provider}/{MODEL}", **ask)
        assert "Paris" in answer.choices[0].message.content and answer.usage.completion_tokens > 0


@step
def stream() -> None:
    for provider in PROVIDERS:
        whole = litellm.completion(model=f"{provider}/{MODEL}", **ask).choices[0].message.content
        parts = list(litellm.completion(model=f"{provider}/{MODEL}", **ask, stream=True, stream_options={"include_usage": True}))
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
        rebuilt = litellm.stream_chunk_builder(parts, messages=PARIS)
        assert rebuilt.choices[0].message.content == whole and rebuilt.usage.prompt_tokens > 0


@step
async def async_stream() -> None:
    for provider in PROVIDERS:
        stream = await litellm.acompletion(model=f"{provider}/{MODEL}", **ask, stream=True)
        assert "Paris" in "".join([part.choices[0].delta.content or "" async for part in stream])


@step
def tools() -> None:
    for provider in PROVIDERS:
        for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
            asked = {**ask, "model": f"{provider}/{MODEL}", "tools": [WEATHER], "tool_choice": choice}
            calls = litellm.completion(**asked, max_tokens=400).choices[0].message.tool_calls
            assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")
            parts = list(litellm.completion(**asked, max_tokens=400, stream=True))
            rebuilt = litellm.stream_chunk_builder(parts).choices[0].message.tool_calls
            assert [c.function.arguments for c in rebuilt] == [c.function.arguments for c in calls]


class City(BaseModel):
    name: str = Field(max_length=30)
    population: int = Field(ge=0, le=10**8)


@step
def response_format() -> None:
    for provider in PROVIDERS:
        answer = litellm.completion(model=f"{provider}/{MODEL}", **ask, response_format=City)
        City.model_validate_json(answer.choices[0].message.content)


@step
def text_completion() -> None:
    for provider in ("text-completion-openai", "hosted_vllm"):
        answer = litellm.text_completion(model=f"{provider}/{MODEL}", prompt="One, two,", api_base=URL, api_key="none", max_tokens=4)
        assert answer.choices[0].text


@step
def extra_fields() -> None:
    answer = litellm.completion(model=f"hosted_vllm/{MODEL}", **ask, top_k=1, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.choices[0].message.content in ("yes", "no")


@step
def errors() -> None:
    for provider in PROVIDERS:
        try:
            litellm.completion(model=f"{provider}/other", **ask)
        except litellm.NotFoundError:
            continue
        raise AssertionError("an unknown model was accepted")
    for provider in PROVIDERS:
        try:
            litellm.completion(model=f"{provider}/{MODEL}", **{**ask, "messages": [{"role": "user", "content": "word " * 10**4}]})
        except litellm.BadRequestError:
            continue
        raise AssertionError("ten thousand words were accepted")


@step
async def router() -> None:
    deployments = [{"model_name": "m", "litellm_params": {"model": f"{p}/{MODEL}", "api_base": URL, "api_key": "none"}} for p in PROVIDERS]
    made = litellm.Router(model_list=deployments)
    for _ in range(4):
        assert (await made.acompletion(model="m", messages=PARIS, max_tokens=4)).choices[0].message.content
    assert BASE_URL in URL


run("litellm")
