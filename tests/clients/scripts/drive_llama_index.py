"""LlamaIndex's OpenAILike: complete, chat, streams, tools, structured prediction."""

from __future__ import annotations

from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from steps import MODEL, QUESTION, URL, run, step

settings = {"model": MODEL, "api_base": URL, "api_key": "none", "temperature": 0.0, "max_tokens": 200, "max_retries": 0, "context_window": 8192}
chat_model = OpenAILike(**settings, is_chat_model=True, is_function_calling_model=True)
text_model = OpenAILike(**settings, is_chat_model=False)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=30)
    population: int = Field(ge=0, le=10**8)


@step
def chat() -> None:
    answer = chat_model.chat([ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=QUESTION)])
    assert "Paris" in answer.message.content


@step
def stream_chat() -> None:
    parts = list(chat_model.stream_chat([ChatMessage(role="user", content=QUESTION)]))
    whole = chat_model.chat([ChatMessage(role="user", content=QUESTION)]).message.content
    assert parts[-1].message.content == whole == "".join(part.delta or "" for part in parts)


@step
async def async_stream() -> None:
    parts = [part async for part in await chat_model.astream_chat([ChatMessage(role="user", content=QUESTION)])]
    assert "Paris" in parts[-1].message.content


@step
def complete() -> None:
    asked = {"max_tokens": 8}
    whole = text_model.complete("One, two,", **asked).text
    assert whole and list(text_model.stream_complete("One, two,", **asked))[-1].text == whole


@step
def tools() -> None:
    def multiply(a: int, b: int) -> int:
        """Multiply two numbers below ten."""
        return a * b

    tool = FunctionTool.from_defaults(multiply)
    schema = {**tool.metadata.to_openai_tool(skip_length_check=True)}
    assert schema["function"]["name"] == "multiply"
    answer = chat_model.chat_with_tools([tool], user_msg="3 times 4?", tool_required=True, allow_parallel_tool_calls=False)
    calls = chat_model.get_tool_calls_from_response(answer, error_on_no_tool_call=False)
    assert [call.tool_name for call in calls] in (["multiply"], [])
    assert answer.raw.choices[0].finish_reason in ("tool_calls", "length")


@step
def structured() -> None:
    program = FunctionCallingProgram.from_defaults(
        output_cls=City, llm=chat_model, prompt_template_str="{question}", tool_choice={"type": "function", "function": {"name": "City"}}
    )
    assert isinstance(program(question=QUESTION), City)
    assert isinstance(chat_model.structured_predict(City, PromptTemplate("{question}"), question=QUESTION), City)


run("llama-index-llms-openai-like")
