"""A format read off a chat template: it is shown a call, and where it puts name and arguments tells how the model will write them.

    <TOOLCALL>[{"name": NAME, "arguments": {...}}]</TOOLCALL>                  an object between tags
    <|call|>ID<|name|>NAME<|args|>{...}<|end|>                                 a name, then JSON

For templates whose format the table does not have. Formats whose arguments are not JSON are not read off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pagoda.base.errors import InvalidRequest
from pagoda.text.tools.formats import name_then_json, tagged
from pagoda.text.tools.parser import Format

__all__ = ["derive", "shown_answer"]

_NAME, _ID, _USER = "zq_probe", "zqcall001", "zq user"
_ARGUMENTS = r'\{\s*"zq_key"\s*:\s*"zq_value"\s*\}'
_OBJECT = re.compile(r"(?P<open>.*?)(?:\[\s*)?\{(?P<body>[^{}]*)" + _ARGUMENTS + r"[^{}]*\}\s*\]?\s*(?P<rest>.*)", re.DOTALL)
_PLAIN = re.compile(r"(?P<open>.*?)" + _NAME + r"(?P<sep>.*?)" + _ARGUMENTS + r"\s*(?P<rest>.*)", re.DOTALL)
_MARKER = re.compile(r"<[^<>]+>|\[/?[A-Z_]+\]")
_PIECE = re.compile(r"<[^<]*|\[[^\[]*")

_TOOLS = [
    {"type": "function", "function": {"name": _NAME, "description": "d", "parameters": {
        "type": "object", "properties": {"zq_key": {"type": "string", "description": "d"}}, "required": ["zq_key"]}}}
]  # fmt: skip
_CALL = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": {"zq_key": "zq_value"}}}


class _Template(Protocol):
    def render(self, messages: Sequence[Any], *, tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True) -> str: ...


def derive(template: _Template) -> Format | None:
    """None where the template shows no call, or in a way that is not understood."""
    asked = {"role": "user", "content": _USER}
    answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    try:
        prompt = template.render([asked], tools=_TOOLS, add_generation_prompt=True)
        whole = template.render([asked, answer], tools=_TOOLS, add_generation_prompt=False)
    except InvalidRequest:
        return None
    return _read(shown_answer(prompt, whole))


def shown_answer(prompt: str, whole: str) -> str:
    """What the assistant is shown to say: behind what both texts begin with, a marker that both begin not cut in two."""
    at = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
    opened = max(whole.rfind("<", 0, at), whole.rfind("[", 0, at))
    closed = max(whole.rfind(">", 0, at), whole.rfind("]", 0, at))
    return whole[opened if opened > closed else at :]


def _read(text: str) -> Format | None:
    found = _OBJECT.match(text)
    if found is not None and (key := re.search(r'"(\w+)"\s*:\s*"' + _NAME + '"', found["body"])):
        opening, closing = found["open"].strip(), _first_marker(found["rest"])
        if not opening or not re.search(r'"(arguments|parameters)"\s*:\s*$', found["body"]):
            return None
        return Format(tagged(*closing, name_keys=(key[1],)), _triggers(opening), markers=closing)
    found = _PLAIN.match(text)
    if found is None:
        return None
    opening, after_id, separator = found["open"].strip(), "", found["sep"].strip()
    if _ID in opening:
        opening, _, after_id = (part.strip() for part in opening.partition(_ID))
        if not after_id:
            return None
    if not opening or not separator or "zq" in opening + after_id + separator:
        return None
    closing = _first_marker(found["rest"])
    markers = tuple(text for text in (after_id, separator, *closing) if len(text) > 1)
    return Format(name_then_json(after_id, separator, "".join(closing)), _triggers(opening), markers=markers)


def _first_marker(text: str) -> tuple[str, ...]:
    found = _MARKER.match(text)
    return (found[0],) if found else ()


def _triggers(opening: str) -> tuple[str, ...]:
    """All that stands before a first call, and what of it will stand before the next ones."""
    pieces = _PIECE.findall(opening)
    return tuple(dict.fromkeys([opening, pieces[-1].strip()] if pieces else [opening]))
