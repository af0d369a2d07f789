"""Reading text that arrives in pieces: coroutines that ask for one character at a time.

A reader is written as if the whole text were there. It stops in `yield` when it has no character, so where the text was cut can
never matter: whatever it says is a function of what it has read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

__all__ = ["Cursor", "Malformed", "Reading", "copy_json", "expect", "json_string", "one_of", "peek", "skip_space", "until"]

T = TypeVar("T")
Reading = Generator[None, str, T]
"""Yields when it needs a character; is sent one, or "" at the end of the text."""

_SPACE = " \n\r\t"


class Malformed(Exception):
    """The text is not what was begun."""


class Cursor:
    """The characters of one piece of a text: `raw` is what was read, `back` what was read too far."""

    def __init__(self) -> None:
        self.raw: list[str] = []
        self.back: list[str] = []  # last in, first out
        self.is_ended = False

    def read(self) -> Reading[str]:
        """The next character, "" at the end."""
        if self.back:
            character = self.back.pop()
        elif self.is_ended:
            return ""
        else:
            character = yield
            if not character:
                self.is_ended = True
                return ""
        self.raw.append(character)
        return character

    def unread(self, text: str) -> None:
        """The last characters read will be read again."""
        if text:
            del self.raw[len(self.raw) - len(text) :]
            self.back += reversed(text)


def peek(cursor: Cursor) -> Reading[str]:
    character = yield from cursor.read()
    cursor.unread(character)
    return character


def skip_space(cursor: Cursor) -> Reading[None]:
    while (character := (yield from cursor.read())) and character in _SPACE:
        pass
    cursor.unread(character)


def one_of(cursor: Cursor, literals: Sequence[str]) -> Reading[str | None]:
    """Reads the longest of `literals` that stands here; None, and nothing read, where none does."""
    seen = ""
    while any(len(literal) > len(seen) and literal.startswith(seen) for literal in literals):
        character = yield from cursor.read()
        if not character:
            break
        seen += character
    found = max((literal for literal in literals if seen.startswith(literal)), key=len, default=None)
    cursor.unread(seen[len(found or "") :])
    return found


def expect(cursor: Cursor, literal: str) -> Reading[None]:
    """Raises Malformed unless `literal` stands here."""
    if (yield from one_of(cursor, (literal,))) is None:
        raise Malformed


def until(cursor: Cursor, *markers: str) -> Reading[tuple[str, str | None]]:
    """Text up to the first of `markers`, and which one it was; None at the end of the text."""
    read: list[str] = []
    lasts = {marker[-1] for marker in markers}
    longest = max(map(len, markers))
    while character := (yield from cursor.read()):
        read.append(character)
        if character in lasts:
            tail = "".join(read[-longest:])
            for marker in markers:
                if tail.endswith(marker):
                    return "".join(read)[: -len(marker)], marker
    return "".join(read), None


def json_string(cursor: Cursor) -> Reading[str]:
    """A JSON string whose opening quote was read."""
    read: list[str] = []
    if not (yield from _copy_string(cursor, read.append)):
        raise Malformed
    try:
        return str(json.loads('"' + "".join(read), strict=False))
    except ValueError:
        raise Malformed from None


def copy_json(cursor: Cursor, write: Callable[[str], Any]) -> Reading[bool]:
    """Writes one JSON value as it stands. False where the text ends inside it; raises Malformed where none begins."""
    yield from skip_space(cursor)
    character = yield from cursor.read()
    if character == '"':
        write(character)
        return (yield from _copy_string(cursor, write))
    if character and character in "{[":
        write(character)
        return (yield from _copy_nested(cursor, write))
    cursor.unread(character)
    if not character or character in ",:]}":
        raise Malformed
    while (character := (yield from cursor.read())) and character not in ",]}" + _SPACE:
        write(character)
    cursor.unread(character)
    return True


def _copy_string(cursor: Cursor, write: Callable[[str], Any]) -> Reading[bool]:
    while character := (yield from cursor.read()):
        write(character)
        if character == '"':
            return True
        if character == "\\":
            write((yield from cursor.read()))
    return False


def _copy_nested(cursor: Cursor, write: Callable[[str], Any]) -> Reading[bool]:
    depth = 1
    while depth:
        character = yield from cursor.read()
        if not character:
            return False
        write(character)
        if character == '"':
            if not (yield from _copy_string(cursor, write)):
                return False
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
    return True
