"""Arguments that are not written as JSON: XML's are text, Python's are literals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pagoda.text.tools.scan import Cursor, Malformed, Reading, skip_space

__all__ = ["python_value", "typed"]

_NAMES: dict[str, Any] = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}


def typed(text: str, schema: Mapping[str, Any] | None, *, guesses: bool) -> Any:
    """The value of a text as its parameter's schema wants it. Without a schema it is text, or with `guesses` JSON if it can be.

    A text that does not fit its type stays text.
    """
    if schema is None:
        return _json_or(text, text) if guesses else text
    kinds = _kinds(schema)
    if text.strip() == "null" and "string" not in kinds:
        return None
    if "string" in kinds or not kinds:
        return text if kinds else _json_or(text, text)
    if kinds == {"boolean"}:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
    value = _json_or(text, text)
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    kind = schema.get("type")
    kinds = set(kind) if isinstance(kind, list) else {kind} if isinstance(kind, str) else set()
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key, ()) if isinstance(schema.get(key), list) else ():
            kinds |= _kinds(part) if isinstance(part, Mapping) else set()
    if not kinds and isinstance(schema.get("enum"), list) and all(isinstance(value, str) for value in schema["enum"]):
        return {"string"}
    return {kind for kind in kinds if isinstance(kind, str)} - {"null"}


def _json_or(text: str, default: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return default


def python_value(cursor: Cursor, depth: int = 0) -> Reading[Any]:
    """A Python literal: string, number, list, tuple, dict, constant (JSON's spellings too). Raises Malformed."""
    yield from skip_space(cursor)
    first = yield from cursor.read()
    if not first or depth > 64:
        raise Malformed
    if first in "'\"":
        return (yield from _string(cursor, first))
    if first in "[(":
        return (yield from _list(cursor, "]" if first == "[" else ")", depth))
    if first == "{":
        return (yield from _dict(cursor, depth))
    cursor.unread(first)
    return (yield from _word(cursor))


def _string(cursor: Cursor, quote: str) -> Reading[str]:
    read: list[str] = []
    while (character := (yield from cursor.read())) != quote:
        if not character:
            raise Malformed
        if character == "\\":
            character = yield from _escaped(cursor)
        read.append(character)
    return "".join(read)


def _escaped(cursor: Cursor) -> Reading[str]:
    letter = yield from cursor.read()
    if letter in _CODES:
        digits = ""
        for _ in range(_CODES[letter]):
            digits += yield from cursor.read()
        try:
            return chr(int(digits, 16))
        except (ValueError, OverflowError):
            raise Malformed from None
    return _ESCAPES.get(letter, "\\" + letter)


def _list(cursor: Cursor, close: str, depth: int) -> Reading[list[Any]]:
    items: list[Any] = []
    while True:
        yield from skip_space(cursor)
        character = yield from cursor.read()
        if character == close:
            return items
        if not character:
            raise Malformed
        if character != ",":
            cursor.unread(character)
            items.append((yield from python_value(cursor, depth + 1)))


def _dict(cursor: Cursor, depth: int) -> Reading[dict[str, Any]]:
    items: dict[str, Any] = {}
    while True:
        yield from skip_space(cursor)
        character = yield from cursor.read()
        if character == "}":
            return items
        if not character:
            raise Malformed
        if character == ",":
            continue
        cursor.unread(character)
        key = yield from python_value(cursor, depth + 1)
        yield from skip_space(cursor)
        if (yield from cursor.read()) != ":":
            raise Malformed
        items[key if isinstance(key, str) else json.dumps(key)] = yield from python_value(cursor, depth + 1)


def _word(cursor: Cursor) -> Reading[Any]:
    read: list[str] = []
    while (character := (yield from cursor.read())) and (character.isalnum() or character in "+-._"):
        read.append(character)
    cursor.unread(character)
    word = "".join(read)
    if word in _NAMES:
        return _NAMES[word]
    for kind in (int, float):
        try:
            value = kind(word)
        except ValueError:
            continue
        if value == value and value not in (float("inf"), float("-inf")):
            return value
    raise Malformed
