"""LangChain's ChatOpenAI and OpenAI: invoke, stream, batch, tools, structured output by each of its methods."""

from __future__ import annotations

from typing import Annotated, Literal

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from steps import MODEL, QUESTION, URL, run, step

model = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", temperature=0, max_retries=0)


@tool
def get_weather(city: Literal["Paris", "Rome"], days: Annotated[int, Field(ge=1, le=9)]) -> str:
    """The weather of a city for some days."""
    return f"sunny in {city} for {days} days"


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=30)
    population: int = Field(ge=0, le=10**8)


@step
def invoke() -> None:
    answer = model.invoke(QUESTION)
    assert isinstance(answer, AIMessage) and "Paris" in answer.content
    assert answer.usage_metadata["total_tokens"] > 0 and answer.response_metadata["finish_reason"] == "stop"


@step
def stream() -> None:
    parts = list(model.stream(QUESTION, stream_usage=True))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    assert whole.content == model.invoke(QUESTION).content and len(parts) > 3
    assert whole.usage_metadata["output_tokens"] > 0


@step
async def async_stream_of_a_chain() -> None:
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "What is the capital of {country}?")]) | model | StrOutputParser()
    text = "".join([part async for part in chain.astream({"country": "France"})])
    assert text == await chain.ainvoke({"country": "France"})


@step
def batch() -> None:
    assert len(model.batch([QUESTION, "What is 1 + 1?", "Name a colour."])) == 3


@step
def tools() -> None:
    for choice in ("any", "get_weather"):
        bound = model.bind_tools([get_weather], tool_choice=choice, parallel_tool_calls=False)
        asked = [HumanMessage("Weather in Paris for 3 days?")]
        answer = bound.invoke(asked)
        call = answer.tool_calls[0]
        assert call["name"] == "get_weather" and set(call["args"]) == {"city", "days"} and not answer.invalid_tool_calls
        whole = None
        for part in bound.stream(asked):
            whole = part if whole is None else whole + part
        assert [c["args"] for c in whole.tool_calls] == [c["args"] for c in answer.tool_calls]
        result = get_weather.invoke(call)
        assert isinstance(result, ToolMessage)
        assert model.bind_tools([get_weather]).invoke([*asked, answer, result]).response_metadata["finish_reason"]


@step
def with_structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(City, method=method).invoke(QUESTION), City)
    for found in model.with_structured_output(City, include_raw=True).stream(QUESTION):
        assert found
    assert isinstance(model.with_structured_output(None, method="json_mode").invoke('Reply with exactly this JSON: {"city": "Paris"}'), dict)


@step
def logprobs() -> None:
    answer = model.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


@step
def text_completion() -> None:
    text = OpenAI(model=MODEL, base_url=URL, api_key="none", temperature=0, max_tokens=8, max_retries=0)
    assert text.invoke("One, two,") == "".join(text.stream("One, two,"))


run("langchain-openai")
