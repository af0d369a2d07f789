"""Routes for those who run the server: what it was started with, and forgetting the prefix cache. Behind the key, where there is one."""

from __future__ import annotations

import dataclasses
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pagoda import __version__
from pagoda.base.config import EngineConfig, ServerConfig
from pagoda.serve.health import state_of

__all__ = ["describe_server", "reset_prefix_cache", "server_info"]

_SECRET = {"api_key", "hf_token"}


def describe_server(config: EngineConfig, server: ServerConfig, **facts: Any) -> dict[str, Any]:
    """Every setting by owner, as resolved; keys and tokens only as whether there are any."""
    owners = {**{owner.name: getattr(config, owner.name) for owner in dataclasses.fields(config)}, "server": server}
    return {"version": __version__, "config": {name: _settings(part) for name, part in owners.items()}, **facts}


def _settings(part: Any) -> dict[str, Any]:
    found = {}
    for item in dataclasses.fields(part):
        value = getattr(part, item.name)
        found[item.name] = ("***" if value else None) if item.name in _SECRET else list(value) if isinstance(value, tuple) else value
    return found


async def server_info(request: Request) -> Response:
    """Version, settings, and what the engine made of them."""
    context, _ = state_of(request).get()
    return JSONResponse(context.server_info)


async def reset_prefix_cache(request: Request) -> Response:
    """Forget all cached prefixes: {"success": false} while any request runs."""
    _, engine = state_of(request).get()
    return JSONResponse({"success": await engine.reset_prefix_cache()})
