"""Structural tags: free text, and inside it pieces that begin with a tag and follow a grammar until the tag's end.

    {"structures": [{"begin", "schema", "end"}], "triggers": [...]}       vLLM's first shape
    {"type": "structural_tag", "format": {...}}                            the second: a tree of formats

Both become one Lark grammar. Where free text meets a trigger, the piece is compulsory; the text ends when the model ends it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pagoda.base.errors import InvalidRequest

__all__ = ["tags_to_lark"]

_ANY = "(.|\\n)*"


def tags_to_lark(given: str | Mapping[str, Any]) -> str:
    """Raises InvalidRequest naming what is wrong with the tag."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise _wrong(f"is not valid JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise _wrong("must be an object")
    writer = _Writer()
    if "structures" in given:
        tags = [
            {"begin": s.get("begin"), "content": {"type": "json_schema", "json_schema": s.get("schema")}, "end": s.get("end")}
            for s in _items(given, "structures")
        ]
        body = writer.node({"type": "triggered_tags", "triggers": given.get("triggers"), "tags": tags}, 0)
    else:
        body = writer.node(given.get("format"), 0)
    return "\n".join([f"start: {body}", *writer.rules])


def _wrong(rule: str) -> InvalidRequest:
    return InvalidRequest(f"`structural_tag` {rule}", param="structured_outputs")


def _items(node: Mapping[str, Any], key: str) -> list[Any]:
    items = node.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(item, Mapping) for item in items):
        raise _wrong(f"needs `{key}`, a list of objects")
    return items


def _text(node: Mapping[str, Any], key: str) -> str:
    value = node.get(key)
    if not isinstance(value, str):
        raise _wrong(f"needs `{key}`, a string")
    return value


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


class _Writer:
    """Collects Lark rules; `node` returns an expression."""

    def __init__(self) -> None:
        self.rules: list[str] = []

    def _rule(self, body: str, *, is_terminal: bool = False, is_lazy: bool = False) -> str:
        name = f"T{len(self.rules)}" if is_terminal else f"r{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if is_lazy else ''}: {body}")
        return name

    def node(self, node: Any, depth: int) -> str:
        if not isinstance(node, Mapping) or depth > 32:
            raise _wrong("has a format that is no object, or is nested too deeply")
        kind = node.get("type")
        if kind == "const_string":
            return self._rule(_quoted(_text(node, "value")))
        if kind == "json_schema":
            return self._rule("%json " + json.dumps(node.get("json_schema", True)))
        if kind == "regex":
            return self._rule("/" + _text(node, "pattern").replace("/", "\\/") + "/")
        if kind == "any_text":
            return self._rule(f"/{_ANY}/", is_terminal=True)
        if kind in ("sequence", "or"):
            parts = [self.node(item, depth + 1) for item in _items(node, "elements")]
            return self._rule((" | " if kind == "or" else " ").join(parts))
        if kind == "tag":
            return self._tag(node, depth, "")
        if kind == "triggered_tags":
            return self._triggered(node, depth)
        if kind == "tags_with_separator":
            tag = self._rule(" | ".join(self._tag(item, depth, "") for item in _items(node, "tags")))
            rest = f"({_quoted(_text(node, 'separator'))} {tag})*"
            one_or_more = f"{tag}" if node.get("stop_after_first") else f"{tag} {rest}"
            return self._rule(one_or_more if node.get("at_least_one") else f"({one_or_more})?")
        raise _wrong(f"has a format of unknown type `{kind}`")

    def _tag(self, tag: Mapping[str, Any], depth: int, trigger: str) -> str:
        """A whole tag, or what follows its trigger. Free text in it ends where the tag's end is first seen."""
        begin, end, content = _text(tag, "begin"), _text(tag, "end"), tag.get("content")
        head = _quoted(begin[len(trigger) :])
        if isinstance(content, Mapping) and content.get("type") == "any_text" and end:
            if '"' in end or "\\" in end:
                raise _wrong("has free text in a tag whose end has a quote or a backslash")
            return self._rule(f"{head} {self._rule(f'/{_ANY}/ {_quoted(end)}', is_lazy=True)}")
        return self._rule(f"{head} {self.node(content, depth + 1)} {_quoted(end)}")

    def _triggered(self, node: Mapping[str, Any], depth: int) -> str:
        triggers = node.get("triggers")
        if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
            raise _wrong("needs `triggers`, a list of strings")
        by_trigger: dict[str, list[str]] = {}
        for tag in _items(node, "tags"):
            begin = _text(tag, "begin")
            trigger = next((t for t in triggers if begin.startswith(t)), None)
            if trigger is None:
                raise _wrong(f"has the tag {begin!r}, which no trigger begins")
            by_trigger.setdefault(trigger, []).append(self._tag(tag, depth, trigger))
        pieces = []
        for trigger, tags in by_trigger.items():
            text = self._rule(f"/{_ANY}/ {_quoted(trigger)}", is_terminal=False, is_lazy=True)
            pieces.append(f"{text} ({' | '.join(tags)})")
        piece = self._rule(" | ".join(f"({p})" for p in pieces))
        tail = "" if node.get("stop_after_first") else self._rule(f"/{_ANY}/", is_terminal=True)
        times = "" if node.get("stop_after_first") else "+" if node.get("at_least_one") else "*"
        return self._rule(f"({piece}){times} {tail}")
