"""Any exception -> OpenAI's error body. Nothing a client sends ends in a 422 or a traceback.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import re

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda.base.errors import InvalidRequest, PagodaError, RequestError
from pagoda.base.log import get_logger

__all__ = ["ErrorBody", "ErrorBoundary", "ErrorInfo", "describe", "error_response", "from_msgspec", "on_exception"]

logger = get_logger("serve")

_LONGEST_MESSAGE = 1000  # characters; a client's own megabyte is not sent back to it
_CODES = {400: "invalid_request", 429: "rate_limit_exceeded", 500: "internal_error", 503: "unavailable", 504: "timeout"}
"""Where an error has no code of its own. OpenAI's are strings."""
_AT = re.compile(r" - at `\$\.?(.*)`$", re.DOTALL)
_MISSING = re.compile(r"object missing required field `(\w+)`")


class ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorInfo


def describe(exc: BaseException) -> tuple[int, ErrorBody]:
    """HTTP status and body of an exception; what is not a PagodaError says nothing about our insides."""
    if isinstance(exc, HTTPException):
        return exc.status_code, ErrorBody(_http_info(exc))
    if not isinstance(exc, PagodaError):
        return 500, ErrorBody(ErrorInfo("internal error; the server's log has the details", "InternalServerError", None, _CODES[500]))
    message = exc.message if len(exc.message) <= _LONGEST_MESSAGE else exc.message[:_LONGEST_MESSAGE] + "..."
    param, code = (exc.param, exc.code) if isinstance(exc, RequestError) else (None, None)
    return exc.http_status, ErrorBody(ErrorInfo(message, exc.type, param, code or _CODES.get(exc.http_status)))


def _http_info(exc: HTTPException) -> ErrorInfo:
    if exc.status_code == 404:
        return ErrorInfo("no such route; see /openapi.json for the list", "NotFoundError", None, "route_not_found")
    if exc.status_code == 405:
        return ErrorInfo("this route does not take that method; see /openapi.json", "MethodNotAllowedError", None, "method_not_allowed")
    return ErrorInfo(str(exc.detail), "HTTPError", None, _CODES.get(exc.status_code))


def error_response(exc: BaseException) -> Response:
    """The answer that tells a client about `exc`."""
    status, body = describe(exc)
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
    if status in (429, 503):
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 413:
        headers["Connection"] = "close"
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")


def from_msgspec(exc: Exception, inside: str = "") -> InvalidRequest:
    """A decoding failure as a 400 whose `param` is the path inside the body (`messages[0].role`); `inside` is the path of what was decoded."""
    text = str(exc)
    if isinstance(exc, msgspec.ValidationError):
        found = _AT.search(text)
        path = _joined(inside, found.group(1) if found else "")
        rule = _AT.sub("", text)
        rule = rule[:1].lower() + rule[1:]
        if missing := _MISSING.match(rule):
            path = _joined(path, missing.group(1))
            return InvalidRequest(f"`{path}` is missing", param=path)
        return InvalidRequest(f"`{path}`: {rule}" if path else f"the request body is wrong: {rule}", param=path or None)
    if isinstance(exc, RecursionError):
        text = "nested too deeply"
    return InvalidRequest(f"the request body is not valid JSON: {text}", code="invalid_json")


def _joined(path: str, rest: str) -> str:
    return f"{path}.{rest}" if path and rest and not rest.startswith("[") else path + rest


class ErrorBoundary:
    """ASGI middleware: a bug of ours is logged and answered like every other error, and the connection lives on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False

        async def noting_send(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception as exc:
            if has_started or scope["type"] != "http":
                raise
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await error_response(exc)(scope, receive, send)


async def on_exception(request: Request, exc: Exception) -> Response:
    """Starlette's handler for the exceptions that are answers."""
    return error_response(exc)
