"""DSPy: plain calls through `openai/`, and typed predictions with a JSON schema through a declared provider.

Of a model that is not in its catalogue DSPy asks no JSON schema, unless a provider is declared to hold one.
"""

from __future__ import annotations

import asyncio
from typing import Literal

import dspy
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider
from steps import MODEL, QUESTION, URL, run, step

settings = {"api_base": URL, "api_key": "none", "temperature": 0.0, "max_tokens": 1000, "cache": False, "num_retries": 0}
access = AccessPolicy(provider="pagoda", env_keys=("PAGODA_API_KEY",), base_url=URL)
register_provider(ProviderDefinition.chat(access, compat=OpenAIChatCompat()), supports=ModelSupport(function_calling=True, response_schema=True))
plain, model = dspy.LM(f"openai/{MODEL}", **settings), dspy.LM(f"pagoda/{MODEL}", **settings)
json_adapter = dspy.JSONAdapter()
dspy.configure(lm=model)


class Judge(dspy.Signature):
    """Say whether the statement is true."""

    statement: str = dspy.InputField()
    verdict: Literal["true", "false"] = dspy.OutputField()


@step
def lm() -> None:
    for each in (plain, model):
        (text,) = each(QUESTION)
        assert "Paris" in (text["text"] if isinstance(text, dict) else text)


@step
def samples() -> None:
    assert len(plain(messages=[{"role": "user", "content": "Name a colour."}], n=3, temperature=1.0)) == 3


@step
def predict() -> None:
    with dspy.context(adapter=json_adapter):
        assert dspy.Predict(Judge)(statement="Water is wet.").verdict in ("true", "false")


@step
def chain_of_thought() -> None:
    with dspy.context(adapter=json_adapter):
        found = dspy.ChainOfThought(Judge)(statement="Fire is cold.")
    assert found.verdict in ("true", "false") and isinstance(found.reasoning, str)


@step
def async_predictions() -> None:
    async def ask() -> list[dspy.Prediction]:
        program = dspy.Predict(Judge)
        return await asyncio.gather(*[program.acall(statement=f"{i} is odd.") for i in range(4)])

    with dspy.context(adapter=json_adapter):
        assert len(asyncio.run(ask())) == 4


@step
def compiled_program() -> None:
    examples = [dspy.Example(statement="Ice is cold.", verdict=verdict).with_inputs("statement") for verdict in ("true", "false")]
    with dspy.context(adapter=json_adapter):
        compiled = dspy.LabeledFewShot(k=2).compile(dspy.Predict(Judge), trainset=examples)
        assert compiled(statement="Snow is warm.").verdict in ("true", "false")


run("dspy")
