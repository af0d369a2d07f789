"""Schemas of answers and of functions' arguments are read as whole lists of properties."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from pagoda.base.types import StructuredOutputsParams
from pagoda.serve.tools import calls_schema
from pagoda.serve.wire import GenerationFields, JsonSchemaFormat, ResponseFormat, StructuredOutputs, structured_outputs
from pagoda.structured.closed import closed

OBJECT = {"type": "object", "properties": {"x": {"type": "integer"}}}
CLOSED = {**OBJECT, "additionalProperties": False}


@pytest.mark.parametrize(
    ("given", "held"),
    [
        (OBJECT, CLOSED),
        ({"properties": {}}, {"properties": {}, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({**OBJECT, "additionalProperties": True}, {**OBJECT, "additionalProperties": True}),
        (
            {**OBJECT, "properties": {"a": OBJECT, "b": {"type": "object", "properties": {}}, "properties": {"type": "array", "items": OBJECT}}},
            {**CLOSED, "properties": {"a": CLOSED, "b": {"type": "object", "properties": {}}, "properties": {"type": "array", "items": CLOSED}}},
        ),
        ({**OBJECT, "allOf": [{"properties": {"y": {}}}]}, {**OBJECT, "allOf": [{"properties": {"y": {}}}]}),
        ({**OBJECT, "anyOf": [OBJECT]}, {**OBJECT, "anyOf": [OBJECT]}),
        ({**OBJECT, "patternProperties": {"^z": {}}}, {**OBJECT, "patternProperties": {"^z": {}}}),
    ],
)
def test_objects_that_list_their_properties_are_closed(given: Any, held: Any) -> None:
    before = copy.deepcopy(given)
    assert closed(given) == held
    assert given == before


def test_forced_calls_and_answers_are_closed_and_structured_outputs_are_not() -> None:
    assert calls_schema({"f": OBJECT}, 1)["$defs"]["tool0"] == CLOSED
    form = ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=OBJECT))
    assert structured_outputs(GenerationFields(response_format=form)) == StructuredOutputsParams(json=CLOSED)
    asked = GenerationFields(structured_outputs=StructuredOutputs(json=OBJECT))
    assert structured_outputs(asked) == StructuredOutputsParams(json=OBJECT)
