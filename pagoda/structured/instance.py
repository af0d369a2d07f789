"""Whether a JSON value fits a JSON schema (draft 2020-12 and the older keywords that are still written).

Only for values that a schema lists itself (`enum`, `const`): what is left of a list once its neighbours have had their say is exact,
where a grammar for the neighbours might not be. Formats are annotations here, as in the standard.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

__all__ = ["Checker", "Undecided", "type_of"]

Resolve = Callable[[str], Any]  # `$ref` -> schema; raises Undecided

_MAX_DEPTH = 64


class Undecided(Exception):
    """A keyword, reference or pattern that is not understood here."""


_NUMBERS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "multipleOf": lambda value, unit: Fraction(repr(value)) % Fraction(repr(unit)) == 0,
}
_SIZES: dict[str, tuple[type, Callable[[Any, Any], bool]]] = {
    "minLength": (str, operator.ge),
    "maxLength": (str, operator.le),
    "minItems": (list, operator.ge),
    "maxItems": (list, operator.le),
    "minProperties": (dict, operator.ge),
    "maxProperties": (dict, operator.le),
}
_ANNOTATIONS = frozenset(
    ["title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "format", "comment", "$comment", "$id", "id", "$schema", "$defs", "definitions", "$anchor", "contentEncoding", "contentMediaType", "nullable", "x-guidance", "defs", "markdownDescription"]
)


def type_of(value: Any) -> str:
    """JSON's name of a value's type; a number without fraction is an integer."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if float(value).is_integer() else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


_OBJECT_KEYS = frozenset(["properties", "patternProperties", "additionalProperties", "required", "propertyNames", "dependencies", "dependentRequired", "dependentSchemas"])
_ARRAY_KEYS = frozenset(["items", "prefixItems", "contains", "uniqueItems"])


class Checker:
    """Looks at no more than `budget` pairs of a value and a schema, over all its calls."""

    def __init__(self, resolve: Resolve, budget: int = 200_000) -> None:
        self._resolve, self._budget = resolve, budget

    def fits(self, value: Any, schema: Any, depth: int = 0) -> bool:
        """Raises Undecided where this cannot be said."""
        if isinstance(schema, bool):
            return schema
        self._budget -= 1
        if self._budget < 0 or depth > _MAX_DEPTH or not isinstance(schema, Mapping):
            raise Undecided("too much, too deep, or no schema")
        return all(self._fits_keyword(value, key, schema, depth + 1) for key in schema)

    def _fits_keyword(self, value: Any, key: str, schema: Mapping[str, Any], depth: int) -> bool:
        wanted = schema[key]

        def inner(item: Any, sub: Any) -> bool:
            return self.fits(item, sub, depth)

        if key in _ANNOTATIONS or key in ("then", "else", "additionalItems"):
            if key == "additionalItems" and isinstance(schema.get("items"), list):
                raise Undecided(key)
            return True
        if key == "type":
            kinds = wanted if isinstance(wanted, list) else [wanted]
            kind = type_of(value)
            return kind in kinds or (kind == "integer" and "number" in kinds)
        if key == "enum":
            self._budget -= len(wanted) // 8
            return any(_equal(value, item) for item in wanted)
        if key == "const":
            return _equal(value, wanted)
        if key in _NUMBERS:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return not is_number or _NUMBERS[key](value, wanted)
        if key in _SIZES:
            kind_, holds = _SIZES[key]
            return type(value) is not kind_ or bool(holds(len(value), wanted))  # type: ignore[arg-type]
        if key == "pattern":
            return not isinstance(value, str) or _searches(wanted, value)
        if key == "$ref":
            return inner(value, self._resolve(wanted))
        if key == "allOf":
            return all([inner(value, sub) for sub in wanted])
        if key == "anyOf":
            return any([inner(value, sub) for sub in wanted])
        if key == "oneOf":
            return sum([inner(value, sub) for sub in wanted]) == 1
        if key == "not":
            return not inner(value, wanted)
        if key == "if":
            return inner(value, schema.get("then" if inner(value, wanted) else "else", True))
        if isinstance(value, dict):
            return _fits_object(value, key, schema, inner)
        if isinstance(value, list):
            return _fits_array(value, key, schema, inner)
        if key in _OBJECT_KEYS or key in _ARRAY_KEYS:
            return True
        raise Undecided(key)


def _fits_object(value: dict[str, Any], key: str, schema: Mapping[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
    wanted = schema[key]
    if key == "required":
        return all(name in value for name in wanted)
    if key == "properties":
        return all([inner(value[name], sub) for name, sub in wanted.items() if name in value])
    if key == "patternProperties":
        return all([inner(item, sub) for pattern, sub in wanted.items() for name, item in value.items() if _searches(pattern, name)])
    if key == "additionalProperties":
        patterns = schema.get("patternProperties", {})
        rest = [n for n in value if n not in schema.get("properties", {}) and not any(_searches(p, n) for p in patterns)]
        return all([inner(value[name], wanted) for name in rest])
    if key == "propertyNames":
        return all([inner(name, wanted) for name in value])
    if key in ("dependencies", "dependentRequired", "dependentSchemas"):
        return all([
            all(n in value for n in sub) if isinstance(sub, list) else inner(value, sub)
            for name, sub in wanted.items() if name in value
        ])  # fmt: skip
    if key in _ARRAY_KEYS:
        return True
    raise Undecided(key)


def _fits_array(value: list[Any], key: str, schema: Mapping[str, Any], inner: Callable[[Any, Any], bool]) -> bool:
    wanted = schema[key]
    if key == "prefixItems" or (key == "items" and isinstance(wanted, list)):
        return all([inner(item, sub) for item, sub in zip(value, wanted)])
    if key == "items":
        return all([inner(item, wanted) for item in value[len(schema.get("prefixItems", [])) :]])
    if key == "contains":
        if "minContains" in schema or "maxContains" in schema:
            raise Undecided("minContains")
        return any([inner(item, wanted) for item in value])
    if key == "uniqueItems":
        return not wanted or not any(_equal(a, b) for i, a in enumerate(value) for b in value[:i])
    if key in _OBJECT_KEYS:
        return True
    raise Undecided(key)


def _equal(a: Any, b: Any) -> bool:
    """JSON's equality: 1 is 1.0, and neither is true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b)


_REPEAT = re.compile(r"[*+{]")


def _searches(pattern: str, text: str) -> bool:
    """Patterns that Python's backtracking could take for ever on are left undecided."""
    if len(pattern) > 200 or len(text) > 200 or len(_REPEAT.findall(pattern)) > 3 or re.search(r"\)[*+{]", pattern):
        raise Undecided("pattern")
    try:
        return re.search(pattern, text) is not None
    except re.error:
        raise Undecided("pattern") from None
