"""Text of a model -> content and tool calls, while it arrives.

    TEXT  --trigger-->  CALL (a coroutine of `formats.py` reads it)  --its end-->  TEXT
                          |
                          +-- not a call after all, and nothing said yet: what was read is content

However the text is cut, the deltas join to the same: in TEXT only what cannot begin a trigger is handed out, in CALL the coroutine
sees characters. White space before a call belongs to nobody, and so does text behind a call, as in vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pagoda.text.tools.scan import Cursor, Malformed, Reading

__all__ = ["Calls", "Delta", "Format", "Schemas", "ToolParser", "joined", "schemas_of"]

Schemas = Mapping[str, Mapping[str, Any]]
"""Function name -> JSON schema of its parameters."""


class Delta(NamedTuple):
    """What is new. "call" begins call number `call_idx`, whose name is `text`; "arguments" goes on with its JSON."""

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call_idx: int = 0
    id: str | None = None  # of a call, where the model gives it one


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """Neighbours of the same kind as one delta."""
    result: list[Delta] = []
    for delta in deltas:
        last = result[-1] if result else None
        if last is not None and delta.kind != "call" and (last.kind, last.call_idx) == (delta.kind, delta.call_idx):
            result[-1] = last._replace(text=last.text + delta.text)
        else:
            result.append(delta)
    return result


def schemas_of(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Mapping[str, Any]]:
    """From a request's `tools`; what is not shaped like one is passed over."""
    functions = [tool["function"] for tool in tools or () if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping)]
    return {f["name"]: f.get("parameters") or {} for f in functions if isinstance(f.get("name"), str)}


class Calls:
    """Where a coroutine says what it found."""

    def __init__(self, schemas: Schemas) -> None:
        self.schemas = schemas
        self.deltas: list[Delta] = []
        self.num_calls = 0
        self._has_arguments = False
        self._is_built = False
        self._name: str | None = None

    @property
    def is_open(self) -> bool:
        """A call has begun and not ended."""
        return self._name is not None

    def start(self, name: str, call_id: str | None = None) -> None:
        self._name, self._has_arguments, self._is_built = name, False, False
        self.deltas.append(Delta("call", name, self.num_calls, call_id))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments' JSON, as the model writes it."""
        if text:
            self._has_arguments = True
            self.deltas.append(Delta("arguments", text, self.num_calls - 1))

    def argument(self, key: str, value: Any) -> None:
        """One argument of a format that is not JSON."""
        text = f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
        self.arguments((", " if self._is_built else "{") + text)
        self._is_built = True

    def parameter(self, key: str) -> Mapping[str, Any] | None:
        """The schema of a parameter of the open call, if it is known."""
        found = self.schemas.get(self._name or "", {}).get("properties", {})
        sub = found.get(key) if isinstance(found, Mapping) else None
        return sub if isinstance(sub, Mapping) else None

    def end(self) -> None:
        """Of the open call, if there is one."""
        if self._name is not None:
            if self._is_built:
                self.arguments("}")
            elif not self._has_arguments:
                self.arguments("{}")
            self._name = None


Coroutine = Callable[[Calls, Cursor, str], Reading[None]]


@dataclass(frozen=True)
class Format:
    """How a model writes calls. `read(calls, cursor, trigger)` begins behind the trigger; it raises Malformed for what is no call."""

    read: Coroutine
    triggers: tuple[str, ...]
    start_triggers: tuple[str, ...] = ()  # only where nothing but white space came before; "" is always there
    markers: tuple[str, ...] = ()  # besides the triggers, what must not be lost as special tokens
    keeps_content: bool = True  # text beside calls is content


class ToolParser:
    def __init__(self, format: Format, schemas: Schemas | None = None) -> None:
        self._format, self._calls = format, Calls(schemas or {})
        self._held = ""
        self._is_start = True
        self._reading: Reading[None] | None = None
        self._cursor, self._trigger, self._before = Cursor(), "", ""
        self._num_calls_before = 0

    def feed(self, text: str) -> list[Delta]:
        """Deltas that this text completes."""
        while text:
            text = self._scan(text) if self._reading is None else self._drive(text)
        return self._take()

    def close(self) -> list[Delta]:
        """The rest, at the end of the text."""
        while self._reading is not None:
            rest = self._drive("", is_end=True)
            while rest:  # read too far by what was no call
                rest = self._scan(rest) if self._reading is None else self._drive(rest)
        self._say(self._held)
        self._held = ""
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, self._calls.deltas = self._calls.deltas, []
        return joined(deltas)

    def _say(self, text: str) -> None:
        if text and not self._calls.num_calls:
            self._calls.deltas.append(Delta("content", text))

    # ---- TEXT

    def _scan(self, text: str) -> str:
        """Hands out what is certain; returns what is left when a trigger was met."""
        stream = self._held + text
        self._held = ""
        at, trigger = self._find(stream)
        if trigger is not None:
            before = stream[:at]
            self._say(before.rstrip())
            self._begin(trigger, before[len(before.rstrip()) :])
            return stream[at + len(trigger) :]
        free = stream[:at].rstrip()
        self._say(free)
        self._held = stream[len(free) :]
        if free:
            self._is_start = False
        return ""

    def _find(self, stream: str) -> tuple[int, str | None]:
        """The first place where a trigger stands or may come to stand, the longest one there; None while that is open."""
        places: list[tuple[int, int, str | None]] = []
        lead = len(stream) - len(stream.lstrip())
        if self._is_start and lead < len(stream):
            for trigger in self._format.start_triggers:
                if stream.startswith(trigger, lead):
                    places.append((lead, -len(trigger), trigger))
                elif trigger.startswith(stream[lead:]):
                    places.append((lead, -len(trigger), None))
        for trigger in self._format.triggers:
            at = stream.find(trigger)
            if at >= 0:
                places.append((at, -len(trigger), trigger))
                continue
            tails = range(max(0, len(stream) - len(trigger) + 1), len(stream))
            if (at := next((at for at in tails if trigger.startswith(stream[at:])), -1)) >= 0:
                places.append((at, -len(trigger), None))
        if not places:
            return len(stream), None
        at, _, found = min(places, key=lambda place: place[:2])
        return at, found

    # ---- CALL

    def _begin(self, trigger: str, before: str) -> None:
        self._cursor, self._trigger, self._before = Cursor(), trigger, before
        self._num_calls_before = self._calls.num_calls
        self._reading = self._format.read(self._calls, self._cursor, trigger)
        self._is_start = False
        self._advance(None)

    def _drive(self, text: str, *, is_end: bool = False) -> str:
        """Sends characters until the coroutine ends; returns those it did not use."""
        for place, character in enumerate(text):
            if not self._advance(character):
                return self._leave() + text[place + 1 :]
        while is_end and self._reading is not None:
            if not self._advance(""):
                return self._leave()
        return ""

    def _advance(self, character: str | None) -> bool:
        """False when the coroutine has ended. With None it only begins."""
        assert self._reading is not None
        try:
            if character is None:
                next(self._reading)
            else:
                self._reading.send(character)
            return True
        except (StopIteration, Malformed):
            self._reading = None
            return False

    def _leave(self) -> str:
        """A call has ended, or was none: then its text is content."""
        self._calls.end()
        rest = "".join(reversed(self._cursor.back))
        if self._calls.num_calls == self._num_calls_before:
            self._say(self._before + self._trigger + "".join(self._cursor.raw))
        self._before = ""
        return rest
