"""JSON schemas as they are written, turned into what the grammar engine can hold exactly.

The engine (llguidance) knows most of JSON Schema and refuses the rest. Before it sees a schema:

    not                 pushed inwards until it stands before something that has an opposite
    dependencies, if    become choices: the property is absent, or what depends on it holds
    enum, const         beside other constraints: the values that fit them all, which is exact
    format              unknown ones are annotations, as the standard says
    uniqueItems, ...    what no context-free grammar holds is left out, and said in `notes`

Nothing is dropped without a note; a schema that cannot be held even so is the client's error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pagoda.base.errors import InvalidRequest
from pagoda.structured.instance import Checker, Undecided

__all__ = ["MAX_DEPTH", "Normalizer", "check_size", "without_patterns"]

MAX_DEPTH = 64
MAX_NODES = 50_000
MAX_STEPS = 4 * MAX_NODES  # of rewriting
_MAX_SPLIT = 8  # schemas in a `oneOf` that is written out

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"])
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_UNHOLDABLE = ("uniqueItems", "contains", "minContains", "maxContains", "propertyNames", "unevaluatedProperties", "unevaluatedItems")
_APPLICATORS = ("$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas", "dependencies")
_META = frozenset(["title", "description", "default", "examples", "example", "deprecated", "$comment", "comment", "$schema", "$id", "id", "definitions", "$defs", "defs"])
_OPPOSITES: dict[str, tuple[str, str, int]] = {  # keyword -> the type it speaks of, its opposite, what to add to the limit
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}


class _NoOpposite(Exception):
    """A negation that cannot be written without `not`."""


def check_size(schema: Any) -> None:
    """Raises InvalidRequest for a schema that is nested too deeply or too large to look at."""
    stack: list[tuple[Any, int]] = [(schema, 1)]
    num_nodes = 0
    while stack:
        node, depth = stack.pop()
        num_nodes += 1
        if depth > 2 * MAX_DEPTH:  # a level of a schema is two of JSON: `properties` and the property
            raise InvalidRequest(f"the JSON schema is nested deeper than {MAX_DEPTH} levels", param="response_format")
        if num_nodes > MAX_NODES:
            raise InvalidRequest(f"the JSON schema has more than {MAX_NODES} parts", param="response_format")
        if isinstance(node, Mapping):
            stack += [(item, depth + 1) for item in node.values()]
        elif isinstance(node, list):
            stack += [(item, depth + 1) for item in node]


def without_patterns(node: Any) -> Any:
    """A copy without any `pattern`, and without a `not` that has one in it: what is left allows more, never less. Data (`const`, `enum`, ...)
    stay as they are. `node` is no deeper than `check_size` allows."""
    if isinstance(node, list):
        return [without_patterns(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    kept = {
        key: value
        for key, value in node.items()
        if not (key == "pattern" and isinstance(value, str)) and not (key == "not" and without_patterns(value) != value)
    }
    return {key: value if key in ("const", "enum", "default", "examples") else without_patterns(value) for key, value in kept.items()}


class Normalizer:
    """Rewrites one schema. `notes` says what was left out; `is_regex` tells whether the grammar engine takes a pattern."""

    def __init__(
        self,
        root: Any,
        is_regex: Callable[[str], bool],
        *,
        closes_objects: bool = False,
        splits_one_of: bool = False,
        keeps_patterns: bool = True,
    ) -> None:
        """`splits_one_of` writes `oneOf` as "this and none of the others"; without `keeps_patterns` no `patternProperties` is kept."""
        self.notes: list[str] = []
        self._root, self._is_regex, self._closes_objects = root, is_regex, closes_objects
        self._splits_one_of, self._keeps_patterns = splits_one_of, keeps_patterns
        self._checker = Checker(self._resolve)
        self._num_steps = 0

    def run(self) -> Any:
        return self._schema(self._root)

    # ---- one schema

    def _step(self) -> None:
        """Schemas can be written that grow without bound when they are rewritten."""
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise InvalidRequest("the JSON schema is too complex to be enforced", param="response_format")

    def _schema(self, schema: Any) -> Any:
        if not isinstance(schema, Mapping):
            return schema
        self._step()
        listed = self._listed(schema)
        if listed is not None:
            return listed
        result: dict[str, Any] = {}
        conditions: list[Any] = []
        for key, value in schema.items():
            if key == "not":
                self._add_negation(value, result, conditions)
            elif key in ("dependencies", "dependentRequired", "dependentSchemas") and isinstance(value, Mapping):
                conditions += [self._schema(_dependency(name, needs)) for name, needs in value.items()]
            elif key == "if":
                self._add_condition(schema, conditions)
            elif key in ("then", "else") or (key == "format" and value not in FORMATS):
                continue
            elif key in _UNHOLDABLE:
                self._add_unholdable(key, value, schema, conditions)
            else:
                self._add(key, value, result)
        if "patternProperties" in schema:
            self._open_for_lost_patterns(schema, result)
        if self._closes_objects and "properties" in result and "additionalProperties" not in result:
            result["additionalProperties"] = False
        if conditions:  # behind what `allOf` has: its order is the order of properties
            result["allOf"] = [*result.get("allOf", []), *conditions]
        return result

    def _add_unholdable(self, key: str, value: Any, schema: Mapping[str, Any], conditions: list[Any]) -> None:
        """Keywords that a grammar holds in their simple cases only."""
        has_parts = any(part in schema for part in _APPLICATORS)
        if (value is True and key in ("propertyNames", "unevaluatedProperties", "unevaluatedItems")) or (value == {} and key != "contains"):
            return
        if value is False and key == "uniqueItems":
            return
        if key == "contains" and isinstance(value, bool | dict) and (value in (True, {}) or value is False) and "minContains" not in schema:
            others = {"type": [kind for kind in TYPES if kind != "array"]}
            conditions.append(others if value is False else {"anyOf": [others, {"type": "array", "minItems": 1}]})
        elif key == "propertyNames" and value is False:
            conditions.append({"maxProperties": 0})
        elif key == "unevaluatedProperties" and value is False and not has_parts and "additionalProperties" not in schema:
            names = {part: self._schema({part: schema[part]})[part] for part in ("properties", "patternProperties") if part in schema}
            conditions.append({**names, "additionalProperties": False})
        elif key == "unevaluatedItems" and value is False and not has_parts and "items" not in schema and "contains" not in schema:
            items = {"prefixItems": [self._schema(item) for item in schema["prefixItems"]]} if "prefixItems" in schema else {}
            conditions.append({**items, "items": False})
        else:
            self._note(f"`{key}` cannot be enforced")

    def _add(self, key: str, value: Any, result: dict[str, Any]) -> None:
        if key == "oneOf" and self._splits_one_of and (split := self._split(value)) is not None:
            result["allOf"] = [*result.get("allOf", []), {"anyOf": split}]
            return
        if key == "allOf" and isinstance(value, list):
            value = [*result.get("allOf", []), *[self._schema(item) for item in value]]
        elif key in _LISTS and isinstance(value, list):
            value = [self._schema(item) for item in value]
        elif key in _SINGLES:
            value = [self._schema(item) for item in value] if isinstance(value, list) else self._schema(value)
        elif key == "patternProperties" and isinstance(value, Mapping):
            value = {pattern: self._schema(item) for pattern, item in value.items() if self._keeps(pattern)}
        elif key in _MAPS and isinstance(value, Mapping):
            value = {name: self._schema(item) for name, item in value.items()}
        elif key == "pattern" and isinstance(value, str) and not self._has_regex(value):
            return
        result[key] = value

    def _split(self, schemas: Any) -> list[Any] | None:
        """One choice per schema: it holds, and none of the others does. None where an opposite is missing."""
        if not isinstance(schemas, list) or len(schemas) > _MAX_SPLIT:
            return None
        try:
            opposites = [self._schema(self._negate(schema, 0)) for schema in schemas]
        except (_NoOpposite, Undecided, RecursionError):
            return None
        kept = [self._schema(schema) for schema in schemas]
        return [{"allOf": [kept[i], *opposites[:i], *opposites[i + 1 :]]} for i in range(len(kept))]

    def _open_for_lost_patterns(self, schema: Mapping[str, Any], result: dict[str, Any]) -> None:
        """A closed object whose pattern was lost must still take the names the pattern stood for."""
        given, kept = schema["patternProperties"], result.get("patternProperties", {})
        lost = [self._schema(item) for pattern, item in given.items() if pattern not in kept]
        if lost and result.get("additionalProperties", True) is not True:
            result["additionalProperties"] = {"anyOf": [result["additionalProperties"], *lost]}

    def _has_regex(self, pattern: str) -> bool:
        if self._is_regex(pattern):
            return True
        self._note(f"the pattern {pattern[:60]!r} cannot be enforced")
        return False

    def _keeps(self, pattern: str) -> bool:
        if self._keeps_patterns:
            return self._has_regex(pattern)
        self._note("`patternProperties` cannot be enforced")
        return False

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _resolve(self, ref: str) -> Any:
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise Undecided(ref)
        node = self._root
        for part in [part for part in ref[1:].split("/") if part]:
            name = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(node, Mapping) or name not in node:
                raise Undecided(ref)
            node = node[name]
        return node

    # ---- lists of values

    def _listed(self, schema: Mapping[str, Any]) -> dict[str, Any] | None:
        """A schema that lists its values: those that fit everything else in it. None where there is no list or nothing else."""
        values = _values_of(schema)
        others = [key for key in schema if key not in _META and key not in ("enum", "const")]
        if values is None or (not others and not ("enum" in schema and "const" in schema)):
            return None
        if others == ["type"] and all(isinstance(value, str) for value in values):
            return None
        try:
            rules = {key: schema[key] for key in schema if key != ("const" if "const" in schema else "enum")}
            kept = [value for value in values if self._checker.fits(value, rules)]
        except (Undecided, TypeError, ArithmeticError, RecursionError):
            return None
        rest = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        if rest:
            rest = {key: {name: self._schema(item) for name, item in value.items()} for key, value in rest.items()}
        return {"enum": kept, **rest} if kept else {"type": "string", "enum": [], **rest}

    # ---- conditions

    def _add_negation(self, value: Any, result: dict[str, Any], conditions: list[Any]) -> None:
        try:
            conditions.append(self._schema(self._negate(value, 0)))
        except (_NoOpposite, Undecided, RecursionError):
            self._note("a `not` cannot be enforced")

    def _add_condition(self, schema: Mapping[str, Any], conditions: list[Any]) -> None:
        try:
            opposite = self._negate(schema["if"], 0)
        except (_NoOpposite, Undecided, RecursionError):
            self._note("an `if` cannot be enforced")
            return
        then = {"allOf": [schema["if"], schema.get("then", True)]}
        conditions.append(self._schema({"anyOf": [then, {"allOf": [opposite, schema.get("else", True)]}]}))

    def _negate(self, schema: Any, depth: int) -> Any:
        """A schema for everything else. Raises _NoOpposite."""
        if isinstance(schema, bool):
            return not schema
        self._step()
        if depth > 16 or not isinstance(schema, Mapping):
            raise _NoOpposite
        keys = [key for key in schema if key not in _META]
        if not keys:
            return False
        grouped = [key for key in keys if key in ("properties", "patternProperties", "additionalProperties")]
        if len(grouped) > 1:
            raise _NoOpposite
        parts = [self._negate_keyword(key, schema, depth + 1) for key in keys]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}

    def _negate_keyword(self, key: str, schema: Mapping[str, Any], depth: int) -> Any:
        value = schema[key]
        if key == "type":
            return _other_types(value)
        if key == "not":
            return value
        if key == "$ref":
            return self._negate(self._resolve(value), depth)
        if key in ("anyOf", "allOf"):
            parts = [self._negate(item, depth) for item in value]
            return {"allOf" if key == "anyOf" else "anyOf": parts}
        if key == "required":
            return {"type": "object", "anyOf": [{"properties": {name: False}} for name in value]} if value else False
        if key == "properties":
            return {
                "anyOf": [{"type": "object", "properties": {n: self._negate(sub, depth)}, "required": [n]} for n, sub in value.items()]
            }
        if key == "items" and isinstance(value, Mapping):
            raise _NoOpposite
        if key in _OPPOSITES:
            kind, opposite, step = _OPPOSITES[key]
            return {"type": kind, opposite: value + step} if value + step >= 0 or kind == "number" else False
        if key in ("enum", "const"):
            return _other_values([value] if key == "const" else value)
        raise _NoOpposite


def _values_of(schema: Mapping[str, Any]) -> list[Any] | None:
    """What the schema, or one of the schemas that all must hold, lists."""
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    for part in schema.get("allOf", []) if isinstance(schema.get("allOf"), list) else []:
        if isinstance(part, Mapping) and (values := _values_of(part)) is not None:
            return values
    return None


def _dependency(name: str, needs: Any) -> dict[str, Any]:
    """`name` is absent, or what it needs is there too."""
    absent = {"properties": {name: False}}
    if isinstance(needs, list):
        return {"anyOf": [absent, {"required": [name, *[need for need in needs if need != name]]}]}
    if needs is True or needs == {}:
        return {}
    return absent if needs is False else {"anyOf": [absent, {"allOf": [{"required": [name]}, needs]}]}


def _other_types(value: Any) -> dict[str, Any]:
    given = set(value if isinstance(value, list) else [value])
    if "integer" in given and "number" not in given:
        raise _NoOpposite  # numbers with a fraction alone
    if "number" in given:
        given.add("integer")
    return {"type": [kind for kind in TYPES if kind not in given]}


def _other_values(values: list[Any]) -> dict[str, Any]:
    """Everything but some strings, null and booleans; other values have no opposite."""
    if any(not isinstance(value, str | bool | None) for value in values):
        raise _NoOpposite
    choices: list[dict[str, Any]] = [{"type": ["number", "array", "object"]}]
    if None not in values:
        choices.append({"type": "null"})
    if flags := [flag for flag in (True, False) if not any(value is flag for value in values)]:
        choices.append({"enum": flags})
    strings = sorted({value for value in values if isinstance(value, str)})
    choices.append({"type": "string", "pattern": _except_strings(strings)} if strings else {"type": "string"})
    return {"anyOf": choices}


def _except_strings(strings: list[str], limit: int = 2000) -> str:
    """A pattern for every string that is not one of these: their prefix tree, left at each place where it may be left."""
    if sum(map(len, strings)) > limit:
        raise _NoOpposite
    return "^(" + _outside(strings) + ")$"


def _outside(rests: list[str]) -> str:
    by_first: dict[str, list[str]] = {}
    for rest in rests:
        if rest:
            by_first.setdefault(rest[0], []).append(rest[1:])
    branches = [] if "" in rests else [""]
    if by_first:
        branches.append("[^" + "".join(_in_class(character) for character in by_first) + r"](.|\n)*")
        branches += [re.escape(first) + "(" + _outside(tails) + ")" for first, tails in by_first.items()]
    else:
        branches.append(r"(.|\n)+")
    return "|".join(branches)


def _in_class(character: str) -> str:
    return "\\" + character if character in "\\]^-[&~" else character
