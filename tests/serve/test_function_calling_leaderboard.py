"""Forced calls on the Berkeley function-calling leaderboard's tools: every grammar compiles and takes the accepted answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.structured_score import END, Bytes, accepts, in_order
from pagoda.base.types import StructuredOutputsParams
from pagoda.serve.tools import calls_schema
from pagoda.structured.matcher import GrammarCompiler
from pagoda.structured.translate import translate

TYPES = {"dict": "object", "float": "number", "tuple": "array"}


def as_json_schema(node: Any) -> Any:
    """The data names types as Python does."""
    if isinstance(node, list):
        return [as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: as_json_schema(value) for key, value in node.items()}
    if node.get("type") == "any":
        del node["type"]
    elif isinstance(node.get("type"), str):
        node["type"] = TYPES.get(node["type"], node["type"])
    return node


def first_choices(value: Any) -> Any:
    """An accepted answer lists what may stand at each place."""
    if isinstance(value, dict):
        return {key: first_choices(item[0] if isinstance(item, list) else item) for key, item in value.items()}
    return [first_choices(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["simple_python", "multiple"])
def test_answers_fit_the_grammar_of_required_calls(shared_data: Path, name: str) -> None:
    folder = shared_data / "tools/bfcl"
    lines = (folder / "possible_answer" / f"BFCL_v4_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {entry["id"]: entry["ground_truth"] for entry in map(json.loads, lines)}
    compiler, num, refused = GrammarCompiler(Bytes, END + 1), 0, []
    for line in (folder / f"BFCL_v4_{name}.jsonl").read_text(encoding="utf-8").splitlines()[::3]:
        entry = json.loads(line)
        schemas = {function["name"]: as_json_schema(function["parameters"]) for function in entry["function"]}
        schema = calls_schema(schemas, max_calls=1)
        translated = translate(StructuredOutputsParams(json=schema))
        assert translated.notes == ()
        matcher = compiler.compile(translated.grammar, [END])
        ((function, given),) = answers[entry["id"]][0].items()
        arguments = {key: first_choices(values[0]) for key, values in given.items() if values and values[0] != ""}
        calls = [{"name": function, "parameters": in_order(arguments, [schemas[function]], schemas[function])}]
        num += 1
        if not accepts(matcher, calls):
            refused.append(entry["id"])
        assert not accepts(matcher, [{"name": "no_such_function", "parameters": arguments}])
    assert num > 60 and len(refused) <= 1, refused
