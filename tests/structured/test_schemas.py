"""JSON schemas: what compiles accepts what it should and refuses the rest; what cannot be held is said."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.structured_score import END, Bytes, Score, accepts, in_order, judge
from pagoda.base.errors import InvalidRequest
from pagoda.base.types import StructuredOutputsParams
from pagoda.structured.instance import Checker, Undecided
from pagoda.structured.matcher import GrammarCompiler, Matcher
from pagoda.structured.translate import translate

COMPILER = GrammarCompiler(Bytes, END + 1)


def matcher_of(**params: Any) -> Matcher:
    return COMPILER.compile(translate(StructuredOutputsParams(**params)).grammar, [END])


def takes(matcher: Matcher, text: str) -> bool:
    matcher = matcher.copy()
    return all(matcher.accept(byte) is None for byte in text.encode()) and matcher.accept(END) is None


def test_json_schema_bench(shared_data: Path) -> None:
    total, wrong = Score(), []
    with open(shared_data / "schemas/jsonschemabench_sample.jsonl", encoding="utf-8") as file:
        for line in file:
            wrong += judge(json.loads(line), COMPILER, total)
    shown = "\n".join(wrong)
    assert total.compiled / total.schemas >= 0.98, shown
    assert total.accepted / total.valid >= 0.99, shown
    assert total.refused / total.invalid >= 0.98, shown


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        ({"not": {"type": "string"}}, [1, None, [], {}], ["a"]),
        ({"type": "string", "not": {"enum": ["ab", "abc"]}}, ["a", "abd", "abcd", "", "x"], ["ab", "abc"]),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "not": {"required": ["a", "b"]}}, [{"a": 1}, {}], [{"a": 1, "b": 1}]),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "dependencies": {"a": ["b"]}}, [{"b": 1}, {"a": 1, "b": 2}], [{"a": 1}]),
        ({"type": "integer", "not": {"minimum": 5}}, [4, -1], [5, 6]),
        ({"type": "string", "format": "of my own"}, ["x"], [1]),
        ({"enum": ["a", 1, None, {"k": 2}], "type": ["string", "object"]}, ["a", {"k": 2}], [1, None]),
        ({"allOf": [{"enum": [1, 2, 3]}, {"not": {"const": 2}}, {"maximum": 2}]}, [1], [2, 3]),
        ({"oneOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]}, [{"a": 1}], [{"a": 1, "b": 2}, {}]),
        (
            {"type": "object", "properties": {"k": {"enum": ["x", "y"]}, "v": {}}, "required": ["k"],
             "if": {"properties": {"k": {"const": "x"}}}, "then": {"required": ["v"]}},
            [{"k": "y"}, {"k": "x", "v": 1}], [{"k": "x"}],
        ),
    ],
)  # fmt: skip
def test_rewritten_keywords_are_exact(schema: dict[str, Any], valid: list[Any], invalid: list[Any]) -> None:
    translated = translate(StructuredOutputsParams(json=schema))
    assert translated.notes == ()
    matcher = COMPILER.compile(translated.grammar, [END])
    assert [value for value in valid if not accepts(matcher, value)] == []
    assert [value for value in invalid if accepts(matcher, value)] == []


@pytest.mark.parametrize(
    ("schema", "note"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"type": "string"}}, "contains"),
        ({"type": "string", "pattern": "^(?!a).*$"}, "pattern"),
        ({"not": {"pattern": "a+"}}, "not"),
    ],
)
def test_what_is_not_enforced_is_noted(schema: dict[str, Any], note: str) -> None:
    assert any(note in text for text in translate(StructuredOutputsParams(json=schema)).notes)


def test_json_schema_test_suite(shared_data: Path) -> None:
    """The value checker behind `enum` agrees with the standard's own tests wherever it decides."""
    counts: Counter[str] = Counter()
    for path in sorted((shared_data / "schemas/json-schema-test-suite").rglob("*.json")):
        if path.name == "vocabulary.json":
            continue  # a metaschema of one's own can switch keywords off: not done here
        for group in json.loads(path.read_text(encoding="utf-8")):
            for test in group["tests"]:
                try:
                    found = Checker(_undecided).fits(test["data"], group["schema"])
                except Undecided:
                    counts["undecided"] += 1
                    continue
                counts["right" if found == test["valid"] else f"{path.name}: {group['description']}: {test['description']}"] += 1
    wrong = sorted(set(counts) - {"right", "undecided"})
    assert wrong == []
    assert counts["right"] > 500


def _undecided(ref: str) -> Any:
    raise Undecided(ref)


def test_other_kinds() -> None:
    cases: list[tuple[dict[str, Any], list[str], list[str]]] = [
        ({"regex": r"^\d{2}/[a-z]+$"}, ["12/ab"], ["1/ab", "12/", "x12/a"]),
        ({"choice": ["yes", 'say "no"', "h\u00e9"]}, ["yes", 'say "no"', "h\u00e9"], ["ye", "no"]),
        ({"grammar": 'root ::= "a" b*\nb ::= "b" | "c"'}, ["a", "abc"], ["b", "ad"]),
        ({"grammar": 'start: "x" /[0-9]+/'}, ["x1"], ["x"]),
        ({"json_object": True}, ['{"a": [1]}', "{}"], ["[]", "1"]),
        ({"json": '{"type": "boolean"}'}, ["true"], ["null"]),
        ({"json": True}, ["[1]", "null"], ["x"]),
        ({"json": {"type": "object", "properties": {"a": {}}}, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"json": {"type": "object", "properties": {"a": {}}}, "disable_additional_properties": True}, ['{"a":1}'], ['{"b":1}']),
    ]
    for params, valid, invalid in cases:
        matcher = matcher_of(**params)
        assert [text for text in valid if not takes(matcher, text)] == [], params
        assert [text for text in invalid if takes(matcher, text)] == [], params


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


@pytest.mark.parametrize(
    "tag",
    [
        {"structures": [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f="]},
        {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": ["<f="], "tags": [
            {"type": "tag", "begin": "<f=a>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</f>"}]}},
    ],
)  # fmt: skip
def test_structural_tags(tag: dict[str, Any]) -> None:
    matcher = matcher_of(structural_tag=tag)
    for text in ("plain", 'so: <f=a>{"x": 1}</f> done', '<f=a>{"x":1}</f><f=a>{"x":2}</f>', "a < b"):
        assert takes(matcher, text), text
    for text in ('<f=a>{"x": "no"}</f>', "<f=b>", '<f=a>{"x": 1}'):
        assert not takes(matcher, text), text


def test_a_tree_of_formats() -> None:
    tag = {"format": {"type": "sequence", "elements": [
        {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
        {"type": "or", "elements": [{"type": "const_string", "value": "yes"}, {"type": "regex", "pattern": "n+o/"}]},
    ]}}  # fmt: skip
    matcher = matcher_of(structural_tag=tag)
    assert takes(matcher, "<think>hm < so</think>yes") and takes(matcher, "<think></think>nno/")
    assert not takes(matcher, "yes") and not takes(matcher, "<think>a</think>maybe")


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"json": deep(70)}, "deeper than 64"),
        ({"json": "{"}, "not valid JSON"),
        ({"json": "[]"}, "must be an object"),
        ({"json": {"type": "strin"}}, "cannot be enforced"),
        ({"json": {"$ref": "http://127.0.0.1:1/x"}}, "cannot be enforced"),
        ({"json": {"properties": 5}}, "JSON schema"),
        ({"json": False}, "allows nothing"),
        ({"json": {"enum": ["x" * (1 << 20)]}}, "more than"),
        ({"json": {"enum": list(range(60_000))}}, "more than"),
        ({"regex": "(a"}, "cannot be enforced"),
        ({"regex": ""}, "empty"),
        ({"choice": [""]}, "none of them empty"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "root ::= ((("}, "cannot be read"),
        ({"structural_tag": {"format": {"type": "what"}}}, "unknown type"),
        ({"structural_tag": {"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": ["<b"]}}, "no trigger"),
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["b"]}, "exactly one"),
    ],
)
def test_bad_ones_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        translate(StructuredOutputsParams(**params))


@pytest.mark.parametrize(
    "params",
    [
        {"regex": "((a{1,1000}){1,1000}){1,1000}"},
        {"regex": "(a|b)*a(a|b){60}"},
        {"json": {"type": "array", "items": {"type": "string", "minLength": 100_000}, "minItems": 1_000_000}},
        {"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for i in range(8)]} for j in range(8)]}},
        {"json": {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": f"^(a|b)*a(a|b){{{i % 30}}}$"} for i in range(500)}}},
        {"json": {"oneOf": [{"not": {"oneOf": [{"not": {"oneOf": [{"required": [str(i)]} for i in range(8)]}}] * 8}}] * 8}},
        {"grammar": "start: a\na: a a | \"x\""},
        {"json": {"not": {"$ref": "#/$defs/d0"}, "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 8} for i in range(20)}}},
        {"json": {"enum": list(range(20_000)), "anyOf": [{"const": -i} for i in range(9000)]}},
        {"json": {"enum": list(range(40_000)), "minimum": 5}},
        {"json": {"enum": list(range(20_000)), "allOf": [{"enum": list(range(20_000))}]}},
        {"json": {"enum": ["a" * 150 + "!"], "pattern": "^(a|a)*$"}},
        {"json": {"const": 1, "allOf": [{"$ref": "#/$defs/a"}] * 2, "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 2}}}},
    ],
)
def test_hostile_ones_end_soon(params: dict[str, Any]) -> None:
    """Compiled or refused, and some steps of it, in far less than the time limit."""
    started = time.monotonic()
    try:
        matcher = matcher_of(**params)
        for byte in b'{"p0": "aaaaaaa':
            if matcher.accept(byte) is not None:
                break
            matcher.mask()
    except InvalidRequest:
        pass
    assert time.monotonic() - started < 10


def test_nothing_is_left_out_in_silence(shared_data: Path) -> None:
    """The standard's own tests: a schema compiled without a note refuses every instance that does not fit it."""
    num_schemas, num_refused, num_valid, num_accepted = 0, 0, 0, 0
    for path in sorted((shared_data / "schemas/json-schema-test-suite").rglob("*.json")):
        if path.name == "vocabulary.json":
            continue
        for group in json.loads(path.read_text(encoding="utf-8")):
            schema = group["schema"]
            try:
                translated = translate(StructuredOutputsParams(json=schema))
                matcher = COMPILER.compile(translated.grammar, [END])
            except InvalidRequest:
                continue
            num_schemas += 1
            for test in group["tests"]:
                is_accepted = accepts(matcher, test["data"]) or accepts(matcher, in_order(test["data"], [schema], schema))
                if test["valid"]:
                    num_valid, num_accepted = num_valid + 1, num_accepted + is_accepted
                elif not is_accepted:
                    num_refused += 1
                else:
                    assert translated.notes, f"{path.name}: {group['description']}: {test['description']}: {test['data']}"
    assert num_schemas > 330 and num_refused > 300
    assert num_accepted / num_valid > 0.96  # formats are asserted, and numbers have one spelling


def test_patterns_that_cannot_be_had_together_are_left_out_and_named() -> None:
    """The engine cannot tell whether the four have a string in common; data that only look like a pattern stay."""
    patterns = ["^([a-z][0-9])+$", "((c1d3g3).{4,8}){6,6}", "(t|8){10,10}..$", "^z9((.){10,10}){10,10}z9$"]
    schema = {"properties": {"x": {"allOf": [{"pattern": pattern} for pattern in patterns]}, "y": {"const": {"pattern": "a"}}}, "required": ["y"]}
    translated = translate(StructuredOutputsParams(json={"type": "object", **schema}))
    assert "its patterns cannot be enforced together" in translated.notes
    assert '"const": {"pattern": "a"}' in json.dumps(json.loads(translated.grammar)) and "c1d3g3" not in translated.grammar
    opposite = {"type": "string", "allOf": [*schema["properties"]["x"]["allOf"], {"not": {"pattern": "^a"}}]}
    assert translate(StructuredOutputsParams(json=opposite)).notes, "what is left of the `not` must not forbid everything"
    alone = translate(StructuredOutputsParams(json={"type": "string", "pattern": patterns[0]}))
    assert alone.notes == () and "a-z" in alone.grammar
