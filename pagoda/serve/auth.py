"""Bearer keys. Digests of equal length are compared in constant time, and every key is compared every time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pagoda.base import env
from pagoda.base.config import ServerConfig
from pagoda.base.errors import ConfigError, Unauthorized
from pagoda.serve.errors import error_response

__all__ = ["OPEN_PATHS", "BearerAuth", "read_keys"]

OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/version", "/load", "/metrics"})
"""What probes and scrapers read; none of it tells anything about requests or models' outputs."""


def read_keys(config: ServerConfig) -> list[str]:
    """Keys of the flags, of the file (one a line; `#` begins a comment line) and of the environment. Raises ConfigError."""
    keys = [*config.api_key, env.api_key() or ""]
    if config.api_key_file is not None:
        path = Path(config.api_key_file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"`--api-key-file {config.api_key_file}` cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"`--api-key-file {config.api_key_file}` has no key")
        keys += found
    return [key for key in keys if key]


class BearerAuth:
    """ASGI middleware: every route but OPEN_PATHS needs `Authorization: Bearer KEY` with one of the keys."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and _route_path(scope) not in OPEN_PATHS:
            given = Headers(scope=scope).get("authorization", "")
            if not self._accepts(given):
                what = "the API key is wrong" if given else "an API key is needed"
                error = Unauthorized(f"{what}: send `Authorization: Bearer KEY`", code="invalid_api_key")
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _accepts(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _route_path(scope: Scope) -> str:
    """The path without the prefix a proxy put before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
