"""The table of formats: how families of models write tool calls. A row is a coroutine, its triggers, and nothing else.

    JSON objects      {"name": ..., "arguments": {...}}, alone or in a list, between tags      hermes, llama3_json, granite, ...
    name, then JSON   a name between markers, its arguments as JSON behind it                   deepseek, kimi, mistral
    XML               <function=name><parameter=key>value</parameter></function>                qwen3_coder, glm, minimax, ...
    Python            [name(key=value)]                                                         llama4_pythonic, olmo3
    Gemma             call:name{key:<escape>value<escape>}
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pagoda.text.tools.parser import Calls, Coroutine, Format
from pagoda.text.tools.scan import (
    Cursor,
    Malformed,
    Reading,
    copy_json,
    expect,
    json_string,
    one_of,
    peek,
    skip_space,
    until,
)
from pagoda.text.tools.values import python_value, typed

__all__ = ["FORMATS", "NAMED", "REQUIRED", "name_then_json", "tagged"]

# ---- JSON objects


_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")


def _json_call(calls: Calls, cursor: Cursor, *, needs_arguments: bool = False, name_keys: tuple[str, ...] = _NAME_KEYS) -> Reading[None]:
    """One object; its `{` was read. The call begins when its name is known and its arguments begin, in whatever order they come."""
    name = call_id = held = None
    while True:
        yield from skip_space(cursor)
        character = yield from cursor.read()
        if character == ",":
            continue
        if character != '"':
            break
        key = yield from json_string(cursor)
        yield from skip_space(cursor)
        yield from expect(cursor, ":")
        yield from skip_space(cursor)
        if key in name_keys and (yield from one_of(cursor, ('"',))):
            name = yield from json_string(cursor)
            if held is not None:
                _begin(calls, name, call_id)
                calls.arguments(held)
        elif key in _ARGUMENT_KEYS:
            if name is not None:
                _begin(calls, name, call_id)
                yield from _copy_arguments(calls, cursor)
            else:
                read: list[str] = []
                yield from copy_json(cursor, read.append)
                held = "".join(read)
        else:
            read = []
            yield from copy_json(cursor, read.append)
            if key == "id" and read[:1] == ['"']:
                call_id = "".join(read)[1:-1]
    if character == "}" and name is not None and not calls.is_open and not needs_arguments:
        _begin(calls, name, call_id)
    if character != "}" or not calls.is_open:
        raise Malformed
    calls.end()


def _begin(calls: Calls, name: str, call_id: str | None) -> None:
    if not calls.is_open:
        calls.start(name, call_id)


def _copy_arguments(calls: Calls, cursor: Cursor) -> Reading[None]:
    """An object as it stands; some models write it as a string that holds JSON."""
    if (yield from peek(cursor)) == '"':
        yield from cursor.read()
        calls.arguments((yield from json_string(cursor)))
    else:
        yield from copy_json(cursor, calls.arguments)


def _keyed_call(calls: Calls, cursor: Cursor) -> Reading[None]:
    """{"name": {arguments}}; its `{` was read."""
    yield from skip_space(cursor)
    yield from expect(cursor, '"')
    name = yield from json_string(cursor)
    yield from skip_space(cursor)
    yield from expect(cursor, ":")
    calls.start(name)
    yield from _copy_arguments(calls, cursor)
    yield from skip_space(cursor)
    yield from expect(cursor, "}")
    calls.end()


def _json_calls(
    calls: Calls, cursor: Cursor, *, is_keyed: bool = False, needs_arguments: bool = False, name_keys: tuple[str, ...] = _NAME_KEYS
) -> Reading[None]:
    """An object, or a list of objects."""

    def call() -> Reading[None]:
        if is_keyed:
            return _keyed_call(calls, cursor)
        return _json_call(calls, cursor, needs_arguments=needs_arguments, name_keys=name_keys)

    yield from skip_space(cursor)
    first = yield from cursor.read()
    if first == "{":
        yield from call()
        return
    if first != "[":
        raise Malformed
    num = 0
    while True:
        yield from skip_space(cursor)
        character = yield from cursor.read()
        if character == "{":
            yield from call()
            num += 1
        elif character == "]" and num:
            return
        elif character != ",":
            raise Malformed


def tagged(*closings: str, begins_with: str = "", is_keyed: bool = False, name_keys: tuple[str, ...] = _NAME_KEYS) -> Coroutine:
    """JSON behind the trigger (and `begins_with`), then perhaps one of `closings`."""

    def read(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
        if begins_with:
            yield from skip_space(cursor)
            yield from expect(cursor, begins_with)
        yield from _json_calls(calls, cursor, is_keyed=is_keyed, name_keys=name_keys)
        if closings:
            yield from skip_space(cursor)
            yield from one_of(cursor, closings)

    return read


def _bare_json(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
    """Calls that look like any JSON: only an object with a name and arguments is one."""
    if trigger in ("{", "["):
        cursor.raw.append(trigger)
        cursor.unread(trigger)
    try:
        yield from _json_calls(calls, cursor, needs_arguments=True)
    finally:
        if trigger in ("{", "["):
            del cursor.raw[:1]  # said with the trigger


# ---- a name, then JSON


def name_then_json(before_name: str, before_json: str, closing: str) -> Coroutine:
    """[id before_name] NAME before_json {...} [closing], for formats read off a template."""

    def read(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
        call_id = None
        if before_name:
            call_id, marker = yield from until(cursor, before_name)
            if marker is None:
                raise Malformed
        name, marker = yield from until(cursor, before_json)
        if marker is None or not name.strip() or len(name) > 256:
            raise Malformed
        calls.start(name.strip(), call_id)
        yield from copy_json(cursor, calls.arguments)
        yield from skip_space(cursor)
        if closing:
            yield from one_of(cursor, (closing,))

    return read


def _deepseek(*, has_type: bool) -> Coroutine:
    def read(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
        while True:
            yield from skip_space(cursor)
            marker = yield from one_of(cursor, ("<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>"))
            if marker is None and not calls.num_calls:
                raise Malformed
            if marker != "<｜tool▁call▁begin｜>":
                return
            name, sep = yield from until(cursor, "<｜tool▁sep｜>")
            if sep is None:
                raise Malformed
            if has_type:
                name, sep = yield from until(cursor, "\n")
                yield from expect(cursor, "```json")
            calls.start(name.strip())
            yield from copy_json(cursor, calls.arguments)
            yield from until(cursor, "<｜tool▁call▁end｜>")
            calls.end()

    return read


def _kimi(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
    """functions.name:0 is the call's id."""
    is_begun = trigger == "<|tool_call_begin|>"
    while True:
        if not is_begun:
            yield from skip_space(cursor)
            marker = yield from one_of(cursor, ("<|tool_call_begin|>", "<|tool_calls_section_end|>"))
            if marker is None and not calls.num_calls:
                raise Malformed
            if marker != "<|tool_call_begin|>":
                return
        is_begun = False
        call_id, sep = yield from until(cursor, "<|tool_call_argument_begin|>")
        if sep is None:
            raise Malformed
        call_id = call_id.strip()
        calls.start(call_id.rpartition(":")[0].removeprefix("functions.") if ":" in call_id else call_id, call_id)
        yield from copy_json(cursor, calls.arguments)
        yield from until(cursor, "<|tool_call_end|>")
        calls.end()


def _mistral(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
    """A list of objects in older models; name[CALL_ID]id[ARGS]{...} or name{...} in newer ones."""
    yield from skip_space(cursor)
    first = yield from peek(cursor)
    if first and first in "[{":
        yield from _json_calls(calls, cursor)
        return
    name, marker = yield from until(cursor, "[CALL_ID]", "[ARGS]", "{")
    if marker is None or not name.strip():
        raise Malformed
    call_id = None
    if marker == "[CALL_ID]":
        call_id, marker = yield from until(cursor, "[ARGS]")
    if marker == "{":
        cursor.unread("{")
    calls.start(name.strip(), call_id)
    yield from copy_json(cursor, calls.arguments)


# ---- XML


@dataclass(frozen=True)
class Xml:
    """Spellings of a call: call_open NAME name_close (key_open KEY key_close VALUE value_close)* call_close."""

    call_open: str
    name_close: str
    key_open: str
    key_close: str
    value_close: str
    call_close: str
    outer_open: str = ""
    outer_close: str = ""
    guesses: bool = False  # arguments of unknown type are JSON if they can be

    def read(self, calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
        if trigger == self.outer_open:
            yield from skip_space(cursor)
            yield from expect(cursor, self.call_open)
        while True:
            name, close = yield from until(cursor, self.name_close)
            if close is None:
                raise Malformed
            calls.start(name.strip().strip('"'))
            yield from self._arguments(calls, cursor)
            calls.end()
            yield from skip_space(cursor)
            if (yield from one_of(cursor, (self.call_open,))) is None:
                break
        if self.outer_close:
            yield from one_of(cursor, (self.outer_close,))

    def _arguments(self, calls: Calls, cursor: Cursor) -> Reading[None]:
        """An argument that the text does not end is left out."""
        ends = (self.key_open, self.call_close, *([self.outer_close] if self.outer_close else []))
        _, marker = yield from until(cursor, *ends)
        while marker == self.key_open:
            key, close = yield from until(cursor, self.key_close)
            value, end = yield from until(cursor, self.value_close, *ends)
            if close is None or end is None:
                return
            key, _, rest = key.strip().removeprefix('"').partition('"')
            schema = {"type": "string"} if 'string="true"' in rest else calls.parameter(key)
            calls.argument(key, typed(_trimmed(value), schema, guesses=self.guesses))
            marker = end
            if end == self.value_close:
                _, marker = yield from until(cursor, *ends)
        if marker is not None and marker == self.outer_close:
            cursor.unread(marker)


def _trimmed(value: str) -> str:
    """Without the line breaks that only set the value off, or what quotes it as a whole."""
    if value.startswith("<![CDATA[") and value.endswith("]]>"):
        return value[9:-3]
    return value.removeprefix("\n").removesuffix("\n")


def _glm(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
    name, marker = yield from until(cursor, "<arg_key>", "</tool_call>")
    if marker is None or not name.strip() or "{" in name:
        raise Malformed
    calls.start(name.strip())
    while marker == "<arg_key>":
        key, _ = yield from until(cursor, "</arg_key>")
        yield from until(cursor, "<arg_value>")
        value, end = yield from until(cursor, "</arg_value>")
        if end is None:
            break
        key = key.strip()
        calls.argument(key, typed(value, calls.parameter(key), guesses=True))
        _, marker = yield from until(cursor, "<arg_key>", "</tool_call>")


# ---- Python


def _python_call(calls: Calls, cursor: Cursor) -> Reading[None]:
    name = yield from _identifier(cursor)
    yield from expect(cursor, "(")
    calls.start(name)
    while True:
        yield from skip_space(cursor)
        character = yield from cursor.read()
        if character == ")":
            break
        if character == ",":
            continue
        cursor.unread(character)
        key = yield from _identifier(cursor)
        yield from skip_space(cursor)
        yield from expect(cursor, "=")
        calls.argument(key, (yield from python_value(cursor)))
    calls.end()


def _identifier(cursor: Cursor) -> Reading[str]:
    read: list[str] = []
    while (character := (yield from cursor.read())) and (character.isalnum() or character in "_.-"):
        read.append(character)
    cursor.unread(character)
    if not read or read[0].isdigit():
        raise Malformed
    return "".join(read)


def _pythonic(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
    if trigger != "[":
        yield from skip_space(cursor)
        yield from expect(cursor, "[")
    while True:
        yield from skip_space(cursor)
        yield from _python_call(calls, cursor)
        yield from skip_space(cursor)
        if (yield from one_of(cursor, (",",))) is None:
            break
    yield from expect(cursor, "]")
    yield from skip_space(cursor)
    yield from one_of(cursor, ("<|python_end|>", "<|tool_call_end|>"))


def _python_lines(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
    """One call a line, with or without a tag around them."""
    while True:
        yield from skip_space(cursor)
        if (yield from one_of(cursor, ("</function_calls>",))) or not (yield from peek(cursor)):
            return
        yield from _python_call(calls, cursor)


# ---- Gemma


def _gemma(quote: str, close: str) -> Coroutine:
    def read(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
        yield from skip_space(cursor)
        yield from expect(cursor, "call:")
        name, brace = yield from until(cursor, "{")
        if brace is None:
            raise Malformed
        calls.start(name.strip())
        yield from _fields(cursor, calls.argument)
        yield from skip_space(cursor)
        yield from one_of(cursor, (close,))

    def _fields(cursor: Cursor, say: Any) -> Reading[None]:
        while True:
            yield from skip_space(cursor)
            character = yield from cursor.read()
            if character in ("}", ""):
                return
            if character == ",":
                continue
            cursor.unread(character)
            if (yield from one_of(cursor, (quote,))):
                key, _ = yield from until(cursor, quote)
                yield from expect(cursor, ":")
            else:
                key, colon = yield from until(cursor, ":")
                if colon is None:
                    return
            if (yield from peek(cursor)):
                say(key.strip(), (yield from _value(cursor)))

    def _value(cursor: Cursor) -> Reading[Any]:
        yield from skip_space(cursor)
        if (yield from one_of(cursor, (quote,))):
            return (yield from until(cursor, quote))[0]
        character = yield from cursor.read()
        if character == "{":
            found: dict[str, Any] = {}
            yield from _fields(cursor, found.__setitem__)
            return found
        if character == "[":
            items: list[Any] = []
            while True:
                yield from skip_space(cursor)
                character = yield from cursor.read()
                if character in ("]", ""):
                    return items
                if character != ",":
                    cursor.unread(character)
                    items.append((yield from _value(cursor)))
        cursor.unread(character)
        return (yield from _bare(cursor))

    def _bare(cursor: Cursor) -> Reading[Any]:
        read: list[str] = []
        while (character := (yield from cursor.read())) and character not in ",}]":
            read.append(character)
        cursor.unread(character)
        return typed("".join(read).strip(), None, guesses=True)

    return read


# ---- answers that a grammar holds


def _named(calls: Calls, cursor: Cursor, trigger: str) -> Reading[None]:
    """The whole text is the arguments of the one function there is."""
    calls.start(next(iter(calls.schemas)))
    yield from copy_json(cursor, calls.arguments)


NAMED = Format(_named, (), ("",))
REQUIRED = Format(_bare_json, (), ("[",))

_HERMES = Format(tagged("</tool_call>"), ("<tool_call>",), markers=("</tool_call>",))
_QWEN_XML = Xml("<function=", ">", "<parameter=", ">", "</parameter>", "</function>", "<tool_call>", "</tool_call>")
_SEED_XML = Xml("<function=", ">", "<parameter=", ">", "</parameter>", "</function>", "<seed:tool_call>", "</seed:tool_call>")
_MINIMAX_XML = Xml(
    "<invoke name=", ">", "<parameter name=", ">", "</parameter>", "</invoke>", "<minimax:tool_call>", "</minimax:tool_call>", guesses=True
)
_DEEPSEEK_XML = Xml(
    "<｜DSML｜invoke name=", ">", "<｜DSML｜parameter name=", ">", "</｜DSML｜parameter>", "</｜DSML｜invoke>",
    "<｜DSML｜function_calls>", "</｜DSML｜function_calls>", guesses=True,
)  # fmt: skip
_DEEPSEEK_V4_XML = replace(_DEEPSEEK_XML, outer_open="<｜DSML｜tool_calls>", outer_close="</｜DSML｜tool_calls>")
_MINICPM_XML = Xml("<function name=", ">", "<param name=", ">", "</param>", "</function>", guesses=True)
_GLM = Format(_glm, ("<tool_call>",), markers=("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"))
_DEEPSEEK_MARKERS = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
_PYTHONIC = Format(_pythonic, ("<|python_start|>", "<|tool_call_start|>"), ("[",), markers=("<|python_end|>", "<|tool_call_end|>"))
_LLAMA3 = Format(_bare_json, ("<|python_tag|>", "{"))


def _xml(syntax: Xml) -> Format:
    triggers = (syntax.call_open, *([syntax.outer_open] if syntax.outer_open else []))
    markers = (syntax.value_close, syntax.call_close, *([syntax.outer_close] if syntax.outer_close else []))
    return Format(syntax.read, triggers, markers=markers)


FORMATS: dict[str, Format] = {
    "apertus": Format(tagged("<|tools_suffix|>", is_keyed=True), ("<|tools_prefix|>",), markers=("<|tools_suffix|>",)),
    "deepseek_v3": Format(_deepseek(has_type=True), ("<｜tool▁calls▁begin｜>",), markers=_DEEPSEEK_MARKERS),
    "deepseek_v31": Format(_deepseek(has_type=False), ("<｜tool▁calls▁begin｜>",), markers=_DEEPSEEK_MARKERS),
    "deepseek_v32": _xml(_DEEPSEEK_XML),
    "deepseek_v4": _xml(_DEEPSEEK_V4_XML),
    "ernie45": _HERMES,
    "functiongemma": Format(_gemma("<escape>", "<end_function_call>"), ("<start_function_call>",), markers=("<escape>", "<end_function_call>")),
    "gemma4": Format(_gemma('<|"|>', "<tool_call|>"), ("<|tool_call>",), markers=('<|"|>', "<tool_call|>")),
    "glm45": _GLM,
    "glm47": _GLM,
    "granite": Format(tagged(), ("<|tool_call|>", "<tool_call>"), markers=("</tool_call>",)),
    "granite-20b-fc": Format(tagged(), ("<function_call>",)),
    "hermes": _HERMES,
    "hunyuan_a13b": Format(tagged("</tool_calls>"), ("<tool_calls>",), markers=("</tool_calls>",)),
    "internlm": Format(tagged("<|action_end|>", begins_with="<|plugin|>"), ("<|action_start|>",), markers=("<|plugin|>", "<|action_end|>")),
    "jamba": Format(tagged("</tool_calls>"), ("<tool_calls>",), markers=("</tool_calls>",)),
    "kimi_k2": Format(
        _kimi, ("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
        markers=("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
    ),
    "llama3_json": _LLAMA3,
    "llama4_json": _LLAMA3,
    "llama4_pythonic": _PYTHONIC,
    "longcat": Format(tagged("</longcat_tool_call>"), ("<longcat_tool_call>",), markers=("</longcat_tool_call>",)),
    "minicpm5": _xml(_MINICPM_XML),
    "minimax_m2": _xml(_MINIMAX_XML),
    "mistral": Format(_mistral, ("[TOOL_CALLS]",), markers=("[ARGS]", "[CALL_ID]")),
    "olmo3": Format(_python_lines, ("<function_calls>",), ("",), markers=("</function_calls>",)),
    "phi4_mini_json": Format(tagged(), ("functools",)),
    "poolside_v1": _GLM,
    "pythonic": _PYTHONIC,
    "lfm2": _PYTHONIC,
    "qwen3_coder": _xml(_QWEN_XML),
    "qwen3_xml": _xml(_QWEN_XML),
    "seed_oss": _xml(_SEED_XML),
    "step3p5": _xml(_QWEN_XML),
    "xlam": Format(_bare_json, ("[TOOL_CALLS]", "<tool_call>", "[", "{")),
}  # fmt: skip
"""Names are vLLM's (`--tool-call-parser`)."""
