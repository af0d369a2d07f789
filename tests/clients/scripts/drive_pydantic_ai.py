"""pydantic-ai: an agent that answers in text, calls tools, and returns typed output by tool, by JSON schema, and by prompt."""

from __future__ import annotations

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits
from steps import MODEL, QUESTION, URL, run, step

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"), settings={"temperature": 0.0, "max_tokens": 400})


class City(BaseModel):
    name: str = Field(max_length=30)
    population: int = Field(ge=0, le=10**8)


@step
async def text() -> None:
    result = await Agent(model).run(QUESTION)
    assert "Paris" in result.output and result.usage.output_tokens > 0


@step
async def stream() -> None:
    async with Agent(model).run_stream(QUESTION) as result:
        parts = [part async for part in result.stream_text(delta=True, debounce_by=None)]
    assert "Paris" in "".join(parts) and len(parts) > 1


@step
async def tool_output() -> None:
    result = await Agent(model, output_type=ToolOutput(City, strict=True)).run(QUESTION)
    assert isinstance(result.output, City)


@step
async def native_output() -> None:
    result = await Agent(model, output_type=NativeOutput(City)).run(QUESTION)
    assert isinstance(result.output, City)


@step
async def streamed_output() -> None:
    async with Agent(model, output_type=NativeOutput(City)).run_stream(QUESTION) as result:
        seen = [part async for part in result.stream_output()]
    assert isinstance(seen[-1], City)


@step
async def tools() -> None:
    asked: list[str] = []
    agent = Agent(model, output_type=ToolOutput(City), retries=0)

    @agent.tool_plain
    def population_of(city: str) -> int:
        asked.append(city)
        return 2_000_000

    result = await agent.run(QUESTION, model_settings={"parallel_tool_calls": False}, usage_limits=UsageLimits(request_limit=6))
    assert isinstance(result.output, City)


@step
async def conversation() -> None:
    agent = Agent(model, instructions="Be brief.")
    first = await agent.run(QUESTION)
    second = await agent.run("And of Italy?", message_history=first.all_messages())
    assert second.output and len(second.all_messages()) == 4


run("pydantic-ai-slim")
