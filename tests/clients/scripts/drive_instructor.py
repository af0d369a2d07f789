"""instructor: a pydantic model out of each of its modes that ask a server for one, whole, partial, iterable, and in parallel."""

from __future__ import annotations

import instructor
import openai
from pydantic import BaseModel, Field
from steps import MODEL, PARIS, URL, run, step


class City(BaseModel):
    name: str = Field(max_length=30)
    population: int = Field(ge=0, le=10**8)


ask = {"model": MODEL, "messages": PARIS, "temperature": 0, "max_retries": 0}


def made(mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none", max_retries=0), mode=mode)


@step
def tools_mode() -> None:
    city, raw = made(instructor.Mode.TOOLS).create_with_completion(response_model=City, **ask)
    assert isinstance(city, City) and raw.choices[0].message.tool_calls


@step
def strict_tools_mode() -> None:
    assert isinstance(made(instructor.Mode.TOOLS_STRICT).create(response_model=City, **ask), City)


@step
def json_schema_mode() -> None:
    assert isinstance(made(instructor.Mode.JSON_SCHEMA).create(response_model=City, **ask), City)


@step
def partial_stream() -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        parts = list(made(mode).create_partial(response_model=City, **ask))
        assert len(parts) > 1 and parts[-1].name is not None and parts[-1].population is not None


@step
def iterable() -> None:
    found = list(made(instructor.Mode.TOOLS).create_iterable(response_model=City, **{**ask, "max_tokens": 400}))
    assert all(isinstance(city, City) for city in found)


@step
async def async_client() -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0), mode=instructor.Mode.TOOLS)
    assert isinstance(await client.create(response_model=City, **ask), City)


run("instructor")
