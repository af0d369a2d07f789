"""/openapi.json, generated from the route list and the structs that decode and encode the bodies: it cannot drift from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pagoda import __version__
from pagoda.serve.errors import ErrorBody
from pagoda.serve.openai_chat import ChatCompletionChunk, ChatMessage
from pagoda.serve.openai_completions import Completion

__all__ = ["RouteDoc", "openapi"]

_REF = "#/components/schemas/{name}"
_ERRORS = {
    400: "the request is wrong; `param` says where",
    401: "the API key is missing or wrong",
    404: "no such model",
    413: "the body is too large",
    429: "too many requests wait; try again after `Retry-After` seconds",
    500: "the engine could not finish this request",
    503: "loading, shutting down, or the engine is dead",
    504: "the request's time was over before it had any answer",
}


@dataclass(frozen=True, kw_only=True)
class RouteDoc:
    """What the schema says about a route."""

    path: str
    methods: tuple[str, ...]
    summary: str
    request: type[msgspec.Struct] | None = None
    response: type[msgspec.Struct] | None = None
    stream_event: type[msgspec.Struct] | None = None
    media_type: str = "application/json"
    errors: tuple[int, ...] = ()


def openapi(routes: Sequence[RouteDoc]) -> dict[str, Any]:
    """OpenAPI 3.1 document of `routes`."""
    kinds = [kind for route in routes for kind in (route.request, route.response, route.stream_event) if kind is not None]
    kinds += [ErrorBody, ChatMessage, ChatCompletionChunk, Completion]
    unique = list(dict.fromkeys(kinds))
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REF)
    refs = dict(zip(unique, schemas, strict=True))
    _describe_messages(components)
    paths: dict[str, Any] = {}
    for route in routes:
        for method in route.methods:
            paths.setdefault(route.path, {})[method.lower()] = _operation(route, method, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pagoda", "version": __version__, "description": "OpenAI-compatible inference server"},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _describe_messages(components: dict[str, Any]) -> None:
    """Messages reach templates as they came, so their field is a list of objects; the schema can say more."""
    for name in ("ChatCompletionRequest", "TokenizeRequest"):
        field = components.get(name, {}).get("properties", {}).get("messages")
        if field is None:
            continue
        for part in field.get("anyOf", [field]):
            if part.get("type") == "array":
                part["items"] = {"$ref": _REF.format(name="ChatMessage")}


def _operation(route: RouteDoc, method: str, refs: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    name = route.path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(":path", "")
    content: dict[str, Any] = {route.media_type: {"schema": refs[route.response] if route.response else {}}}
    if route.stream_event is not None:
        content["text/event-stream"] = {"schema": refs[route.stream_event]}
    responses: dict[str, Any] = {"200": {"description": "ok", "content": content}}
    for status in route.errors:
        error = {"application/json": {"schema": refs[ErrorBody]}}
        responses[str(status)] = {"description": _ERRORS[status], "content": error}
    operation: dict[str, Any] = {"operationId": f"{method.lower()}_{name}", "summary": route.summary, "responses": responses}
    if 401 in route.errors:
        operation["security"] = [{"bearer": []}, {}]
    if route.request is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": refs[route.request]}}}
    if "{" in route.path:
        parameter = route.path.partition("{")[2].partition("}")[0]
        operation["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation
