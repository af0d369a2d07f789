"""The closed reading of a schema: an object that lists its `properties` and says nothing of others has no others.

JSON Schema allows them, and a small model that is free to add properties goes on adding. Whoever declares a function's arguments, or an
answer's fields, means the list to be whole. A schema that puts objects together of parts is read as it stands, for each part would
refuse what the others list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["closed"]

_JOINING = frozenset({"allOf", "not", "if", "dependentSchemas", "dependencies", "unevaluatedProperties"})
_BESIDE = frozenset({"$ref", "anyOf", "oneOf"})  # these beside `properties` add to the list


def closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same schema with `additionalProperties` false wherever it is meant; itself where parts are joined."""
    found: Mapping[str, Any] = schema if _has_joined_parts(schema) else _closed(schema, is_root=True)
    return found


def _has_joined_parts(node: Any) -> bool:
    if isinstance(node, list):
        return any(_has_joined_parts(item) for item in node)
    if not isinstance(node, Mapping):
        return False
    if not _JOINING.isdisjoint(node) or ("properties" in node and not _BESIDE.isdisjoint(node)):
        return True
    return any(_has_joined_parts(value) for value in node.values())


def _closed(node: Any, is_root: bool = False) -> Any:
    if not isinstance(node, Mapping):
        return node
    found = dict(node)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(parts := node.get(key), Mapping):
            found[key] = {name: _closed(part) for name, part in parts.items()}
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(parts := node.get(key), list):
            found[key] = [_closed(part) for part in parts]
    if "items" in node:
        found["items"] = _closed(node["items"])
    lists = "properties" in node if is_root else bool(node.get("properties"))  # inside, an empty list means a free object
    if lists and "patternProperties" not in node:
        found.setdefault("additionalProperties", False)
    return found
