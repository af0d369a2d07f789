"""Tools of a chat request: what is asked, the grammar that holds it, and how the answer will be read.

    none         tools are not offered to the parser; the answer is text
    auto         the answer is text in which the model's own format of calls is looked for
    required     a grammar makes the answer a list of calls
    named        a grammar makes the answer the arguments of that function
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pagoda.base.errors import InvalidRequest
from pagoda.base.types import StructuredOutputsParams
from pagoda.serve.context import ModelContext
from pagoda.structured.closed import closed
from pagoda.text.message import OutputFormat, output_format
from pagoda.text.tools.parser import schemas_of

__all__ = ["FunctionCall", "ToolCall", "ToolCallDelta", "ToolPlan", "call_id", "calls_schema", "guided", "plan_tools"]

MAX_TOOLS = 1024
_NAME = re.compile(r"[\w.\-]{1,256}")


class FunctionCall(msgspec.Struct, kw_only=True, omit_defaults=True):
    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: str = "function"
    function: FunctionCall


class ToolCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionCall


@dataclass(frozen=True)
class ToolPlan:
    """What a request's tools mean for its answer."""

    format: OutputFormat
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grammar: StructuredOutputsParams | None = None  # of a forced call


def call_id(format_name: str | None) -> str:
    """Mistral's templates accept nine characters only."""
    return uuid.uuid4().hex[:9] if format_name == "mistral" else f"call_{uuid.uuid4().hex[:24]}"


def plan_tools(body: Any, context: ModelContext, warnings: list[str]) -> ToolPlan:
    """From `tools`, `tool_choice` and `parallel_tool_calls`. Raises InvalidRequest naming what is wrong with them."""
    if body.tools is not None and not body.tools:
        raise InvalidRequest("`tools` must not be an empty list; leave it out instead", param="tools")
    _check_tools(body.tools or [])
    schemas: dict[str, Mapping[str, Any]] = dict(schemas_of(body.tools))
    choice, names = _choice(body.tool_choice, schemas)
    reasoning = context.reasoning_format
    if choice == "none" or not schemas:
        return ToolPlan(output_format(None, reasoning))
    schemas = {name: schema for name, schema in schemas.items() if name in names}
    max_calls = 1 if body.parallel_tool_calls is False else None
    if choice == "auto":
        tools = context.tool_format
        if tools is None:
            warnings.append("tool calls come as text: this model's format of calls is not known; see --tool-call-parser")
        elif body.response_format is not None and body.response_format.type != "text":
            warnings.append("response_format holds the answer, so it can have no tool calls")
        format_ = output_format(tools, reasoning, derived=context.derived_format, has_tools=True, max_calls=max_calls)
        return ToolPlan(format_, schemas)
    format_ = output_format(context.tool_format, reasoning, forced=choice, has_tools=True, max_calls=max_calls)
    schema = _parameters(schemas[names[0]]) if choice == "named" else calls_schema(schemas, max_calls)
    return ToolPlan(format_, schemas, StructuredOutputsParams(json=schema))


def _check_tools(tools: list[dict[str, Any]]) -> None:
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"`tools` has {len(tools)} entries; at most {MAX_TOOLS} are taken", param="tools")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if tool.get("type", "function") != "function":
            raise InvalidRequest(f"`{where}.type` is `{tool.get('type')}`; only `function` is known", param=f"{where}.type")
        function = tool.get("function")
        if not isinstance(function, dict):
            raise InvalidRequest(f"`{where}.function` is missing, or is no object", param=f"{where}.function")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidRequest(f"`{where}.function.name` must be a name of letters, digits, `_`, `-` and `.`", param=f"{where}.function.name")
        if name in seen:
            raise InvalidRequest(f"`{where}.function.name`: there is another function `{name}`", param=f"{where}.function.name")
        seen.add(name)
        if not isinstance(function.get("parameters") or {}, dict):
            raise InvalidRequest(f"`{where}.function.parameters` must be a JSON schema", param=f"{where}.function.parameters")


def _choice(given: Any, schemas: Mapping[str, Any]) -> tuple[str, list[str]]:
    """none, auto, required or named, and the functions that may be called."""
    every = list(schemas)
    if given is None:
        return ("auto" if schemas else "none"), every
    if given == "none":
        return "none", every
    if given in ("auto", "required"):
        if not schemas:
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        return given, every
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "function":
        return "named", [_known(given.get("function"), schemas)]
    if kind == "allowed_tools" and isinstance(allowed := given.get("allowed_tools"), dict):
        tools = allowed.get("tools")
        if not isinstance(tools, list) or not tools or allowed.get("mode") not in ("auto", "required"):
            raise InvalidRequest("`tool_choice.allowed_tools` needs `mode` (auto or required) and `tools`", param="tool_choice")
        return str(allowed["mode"]), [_known(tool.get("function") if isinstance(tool, dict) else None, schemas) for tool in tools]
    raise InvalidRequest("`tool_choice` must be `none`, `auto`, `required`, or name a function", param="tool_choice")


def _known(function: Any, schemas: Mapping[str, Any]) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in schemas:
        known = ", ".join(f"`{each}`" for each in list(schemas)[:20]) or "none"
        raise InvalidRequest(f"`tool_choice` names a function that is not in `tools`; there are: {known}", param="tool_choice")
    return name


def _parameters(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", **closed(schema)}


def calls_schema(schemas: Mapping[str, Mapping[str, Any]], max_calls: int | None) -> dict[str, Any]:
    """[{"name": ..., "parameters": {...}}, ...]; each function's schema stands under `$defs`, its own references moved with it."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"enum": [name]}, "parameters": {"$ref": f"#/$defs/tool{i}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for i, name in enumerate(schemas)
    ]
    defs = {f"tool{i}": _moved(_parameters(schema), f"#/$defs/tool{i}") for i, schema in enumerate(schemas.values())}
    count = {} if max_calls is None else {"maxItems": max_calls}
    return {"type": "array", "minItems": 1, **count, "items": {"anyOf": calls}, "$defs": defs}


def _moved(node: Any, root: str) -> Any:
    """References to the schema's own root, from its new place."""
    if isinstance(node, list):
        return [_moved(item, root) for item in node]
    if not isinstance(node, dict):
        return node
    moved = {key: _moved(value, root) for key, value in node.items()}
    if isinstance(ref := moved.get("$ref"), str) and ref.startswith("#"):
        moved["$ref"] = root + ref[1:]
    return moved


def guided(wanted: StructuredOutputsParams, plan: ToolPlan, prompt: str, context: ModelContext) -> StructuredOutputsParams:
    """The same, beginning behind the model's reasoning where this prompt lets it reason."""
    encode = context.tokenizer.encode
    if plan.format.is_harmony:
        return msgspec.structs.replace(wanted, starts_after=encode("<|channel|>final<|message|>", add_special_tokens=False))
    reasoning = plan.format.reasoning
    if reasoning is None or reasoning.is_over(prompt):
        return wanted
    start, end = (encode(marker, add_special_tokens=False) for marker in (reasoning.start, reasoning.end))
    if len(end) != 1:  # no token of its own: where it ends cannot be told from tokens
        return wanted
    if reasoning.is_open(prompt):
        return msgspec.structs.replace(wanted, starts_after=end)
    return msgspec.structs.replace(wanted, starts_after=end, opens_with=start[0]) if len(start) == 1 else wanted


