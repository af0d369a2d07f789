"""Probes. /health: may this process live on? /ready: may requests be sent here? The difference is draining.

/health is 200 while the engine's loop makes progress: its last step boundary, or its last answer to a ping, is younger than
max(10 s, ten times the longest step). It is 503 while the model loads, when the loop stalls, and when it is dead.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pagoda import __version__
from pagoda.serve.context import ServerState

__all__ = ["health", "load", "metrics", "ready", "version"]


def state_of(request: Request) -> ServerState:
    """The server's state, put there by `build_app`."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state


async def health(request: Request) -> Response:
    """200 while the loop makes progress; EngineDead (503) otherwise."""
    await state_of(request).check_engine()
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """200 while new requests are welcome; EngineDead (503) otherwise."""
    state = state_of(request)
    state.get()
    await state.check_engine()
    return JSONResponse({"status": "ready"})


async def version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


async def load(request: Request) -> Response:
    """Requests being answered now, by all API processes."""
    body: dict[str, Any] = {"server_load": state_of(request).metrics.front_figures().server_load}
    return JSONResponse(body)


async def metrics(request: Request) -> Response:
    """Prometheus text exposition."""
    state = state_of(request)
    await state.refresh_metrics()
    return Response(state.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
