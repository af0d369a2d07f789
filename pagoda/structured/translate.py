"""What a request asks for, as one grammar text for llguidance: JSON with a Lark grammar or a JSON schema inside.

Pure: it depends on the request only, never on the vocabulary, so it runs in the API process, off the event loop. What llguidance
refuses is refused here already, with 400; the engine process compiles the text for its vocabulary.
"""

from __future__ import annotations

import functools
import json
from typing import Any, NamedTuple

import msgspec

from pagoda.base.errors import InvalidRequest
from pagoda.base.prepared import prepared
from pagoda.base.types import StructuredOutputsParams
from pagoda.structured.json_schema import Normalizer, check_size, without_patterns
from pagoda.structured.tags import tags_to_lark

__all__ = ["Translated", "both", "translate"]

MAX_TEXT = 1 << 20  # characters of a schema or grammar
MAX_CHOICES = 10_000
_PARAM = "structured_outputs"
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"  # bounded: small models like to go on with spaces for ever


class Translated(NamedTuple):
    """`notes` name what of a schema is not enforced."""

    grammar: str
    notes: tuple[str, ...]


def translate(params: StructuredOutputsParams) -> Translated:
    """Raises InvalidRequest for what cannot be a grammar."""
    return _translate(msgspec.json.encode(params))


@functools.lru_cache(maxsize=64)
def _translate(encoded: bytes) -> Translated:
    if len(encoded) > MAX_TEXT:
        raise InvalidRequest(f"the schema or grammar has more than {MAX_TEXT} characters", param=_PARAM)
    params = msgspec.json.decode(encoded, type=prepared(StructuredOutputsParams))
    if params.json is not None or params.json_object:
        return _from_schema({"type": "object"} if params.json is None else _schema(params.json), params)
    if params.structural_tag is not None:
        return _checked(tags_to_lark(params.structural_tag))
    if params.regex is not None:
        return _checked(f"start: /{_lark_regex(params.regex)}/")
    if params.choice is not None:
        return _checked(_choices(params.choice))
    assert params.grammar is not None
    return _checked(_lark(params.grammar))


def both(grammars: list[str]) -> str:
    """One text that means all of these grammars at once; the first is the one that wins where they contradict each other."""
    return grammars[0] if len(grammars) == 1 else json.dumps({"all": grammars})


def _schema(given: str | dict[str, Any] | bool) -> Any:
    if isinstance(given, bool):
        if not given:
            raise InvalidRequest("the JSON schema `false` allows nothing", param=_PARAM)
        return {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the JSON schema is not valid JSON: {error}", param=_PARAM) from None
    if not isinstance(given, dict):
        raise InvalidRequest("a JSON schema must be an object", param=_PARAM)
    return given


def _from_schema(schema: Any, params: StructuredOutputsParams) -> Translated:
    """The strict reading; where the engine does not take it, one that leaves out what it does not know, with notes."""
    check_size(schema)
    options: dict[str, Any] = {"whitespace_pattern": _WHITESPACE}
    if params.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    first = ""
    bare = without_patterns(schema)
    attempts = [(schema, *attempt) for attempt in _ATTEMPTS]
    if bare != schema:
        attempts.append((bare, *_ATTEMPTS[-1]))  # each may be enforceable, and all of them at once not
    for given, rewriting, reading in attempts:
        normalizer = Normalizer(given, _is_regex, closes_objects=params.disable_additional_properties, **rewriting)
        body = _normalized(normalizer)
        grammar = _wrap(json_schema=body if isinstance(body, bool) else {**body, "x-guidance": {**options, **reading}})
        is_error, messages = _validate(grammar)
        if not is_error:
            lost = () if given is schema else ("its patterns cannot be enforced together",)
            return Translated(grammar, (*lost, *normalizer.notes, *(message.splitlines()[0] for message in messages)))
        first = first or _brief(messages)
    raise InvalidRequest(f"the JSON schema cannot be enforced: {first}", param=_PARAM)


_ATTEMPTS: tuple[tuple[dict[str, bool], dict[str, bool]], ...] = (
    ({}, {}),
    ({"splits_one_of": True}, {}),
    ({}, {"coerce_one_of": True}),
    ({}, {"coerce_one_of": True, "lenient": True}),
    ({"keeps_patterns": False}, {"coerce_one_of": True, "lenient": True}),
)
"""How to rewrite a schema and how to read it, the most exact way first."""


def _normalized(normalizer: Normalizer) -> Any:
    try:
        return normalizer.run()
    except RecursionError:
        raise InvalidRequest("the JSON schema is nested too deeply", param=_PARAM) from None
    except (TypeError, AttributeError, ValueError) as error:
        raise InvalidRequest(f"this is no JSON schema: {error}", param=_PARAM) from None


def _checked(lark: str) -> Translated:
    grammar = _wrap(lark_grammar=lark)
    is_error, messages = _validate(grammar)
    if is_error:
        raise InvalidRequest(f"this cannot be enforced: {_brief(messages)}", param=_PARAM)
    return Translated(grammar, ())


def _wrap(**grammar: Any) -> str:
    return json.dumps({"grammars": [grammar]})


def _validate(grammar: str) -> tuple[bool, list[str]]:
    from llguidance import LLMatcher  # 40 ms, at the first request that wants it

    return LLMatcher.validate_grammar_with_warnings(grammar)


@functools.lru_cache(maxsize=1024)
def _is_regex(pattern: str) -> bool:
    """Whether the engine takes `pattern` in a schema."""
    is_error, _ = _validate(_wrap(json_schema={"type": "string", "pattern": pattern}))
    return not is_error


def _brief(messages: list[str]) -> str:
    return " ".join((messages or ["unknown"])[0].split("<state>")[0].split())[:300]


def _choices(choice: list[str]) -> str:
    if not 1 <= len(choice) <= MAX_CHOICES or not all(choice):
        raise InvalidRequest(f"`choice` must have 1 to {MAX_CHOICES} strings, none of them empty", param=_PARAM)
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)


def _lark(grammar: str) -> str:
    """GBNF and EBNF (`root ::= ...`) become Lark; Lark stays."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # the converter raises what it likes
        raise InvalidRequest(f"the grammar cannot be read: {' '.join(str(error).split())[:300]}", param=_PARAM) from None


def _lark_regex(regex: str) -> str:
    """A whole-text regular expression between Lark's slashes. `\\d` means ASCII digits, as in Python's byte patterns and JavaScript."""
    if not regex:
        raise InvalidRequest("`regex` must not be empty", param=_PARAM)
    body = regex[1:] if regex.startswith("^") and "|" not in regex else regex
    if body.endswith("$") and not body.endswith("\\$") and "|" not in regex:
        body = body[:-1]
    out, in_class, at = [], False, 0
    while at < len(body):
        character = body[at]
        if character == "\\" and at + 1 < len(body):
            pair = body[at : at + 2]
            out.append(("0-9" if in_class else "[0-9]") if pair == "\\d" else pair)
            at += 2
            continue
        in_class = (in_class or character == "[") and character != "]"
        out.append({"/": "\\/", "\n": "\\n"}.get(character, character))
        at += 1
    return "".join(out)
