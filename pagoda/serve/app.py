"""The list of routes, and the ASGI application made of it.

A route is one row of `routes()`: path, methods, endpoint, and the structs that /openapi.json is generated from.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pagoda.base.config import ServerConfig
from pagoda.base.errors import ConfigError, PagodaError
from pagoda.serve import admin, health, invocations, openai_chat, openai_completions, tokenize
from pagoda.serve.auth import BearerAuth, read_keys
from pagoda.serve.context import ModelContext, ServerState
from pagoda.serve.errors import ErrorBoundary, on_exception
from pagoda.serve.generation import GenerateEndpoint, read_json_body, warning_header
from pagoda.serve.http_figures import RequestLog
from pagoda.serve.openai_models import ModelCard, ModelList, list_models, retrieve_model
from pagoda.serve.schema import RouteDoc, openapi
from pagoda.serve.wire import refuse_unknown

__all__ = ["Row", "build_app", "routes"]

_GENERATE_ERRORS = (400, 401, 404, 413, 429, 500, 503, 504)
_TEXT = "text/plain"


@dataclass(frozen=True)
class Row:
    """One route: its endpoint (a function of a request, or an ASGI object) and its documentation."""

    doc: RouteDoc
    endpoint: Any


def routes(state: ServerState) -> list[Row]:
    """Every route of the server. Adding a protocol is adding a row."""
    probes = [
        ("/health", ("GET",), health.health, "200 while the engine's loop makes progress", (503,)),
        ("/ping", ("GET", "POST"), health.health, "as /health", (503,)),
        ("/ready", ("GET",), health.ready, "200 while new requests are welcome", (503,)),
        ("/version", ("GET",), health.version, "version of the server", ()),
        ("/load", ("GET",), health.load, "requests being answered now", ()),
    ]
    rows = [Row(RouteDoc(path=path, methods=methods, summary=text, errors=errors), call) for path, methods, call, text, errors in probes]
    rows += [
        Row(RouteDoc(path="/metrics", methods=("GET",), summary="Prometheus figures", media_type=_TEXT), health.metrics),
        Row(RouteDoc(path="/server_info", methods=("GET",), summary="version and settings", errors=(401, 503)), admin.server_info),
        Row(RouteDoc(path="/reset_prefix_cache", methods=("POST",), summary="forget cached prefixes", errors=(401, 503)), admin.reset_prefix_cache),
        Row(RouteDoc(path="/v1/models", methods=("GET",), summary="models served", response=ModelList, errors=(401, 503)), _models),
        Row(RouteDoc(path="/v1/models/{model}", methods=("GET",), summary="one model", response=ModelCard, errors=(401, 404, 503)), _model),
        Row(
            RouteDoc(
                path="/v1/chat/completions",
                methods=("POST",),
                summary="OpenAI chat completion, streamed or whole",
                request=openai_chat.ChatCompletionRequest,
                response=openai_chat.ChatCompletion,
                stream_event=openai_chat.ChatCompletionChunk,
                errors=_GENERATE_ERRORS,
            ),
            GenerateEndpoint(state, openai_chat.parse),
        ),
        Row(
            RouteDoc(
                path="/v1/completions",
                methods=("POST",),
                summary="OpenAI text completion, streamed or whole",
                request=openai_completions.CompletionRequest,
                response=openai_completions.Completion,
                stream_event=openai_completions.Completion,
                errors=_GENERATE_ERRORS,
            ),
            GenerateEndpoint(state, openai_completions.parse),
        ),
        Row(
            RouteDoc(path="/invocations", methods=("POST",), summary="a chat or a completion, by its body", errors=_GENERATE_ERRORS),
            GenerateEndpoint(state, invocations.parse),
        ),
        Row(
            RouteDoc(
                path="/tokenize",
                methods=("POST",),
                summary="text or chat to token ids",
                request=tokenize.TokenizeRequest,
                response=tokenize.TokenizeResponse,
                errors=(400, 401, 404, 413, 503),
            ),
            _text_endpoint(tokenize.tokenize),
        ),
        Row(
            RouteDoc(
                path="/detokenize",
                methods=("POST",),
                summary="token ids to text",
                request=tokenize.DetokenizeRequest,
                response=tokenize.DetokenizeResponse,
                errors=(400, 401, 404, 413, 503),
            ),
            _text_endpoint(tokenize.detokenize),
        ),
        *([_TOKENIZER_INFO] if state.config.enable_tokenizer_info_endpoint else []),
        Row(RouteDoc(path="/openapi.json", methods=("GET",), summary="this document", errors=(401,)), _openapi),
    ]
    return rows


def build_app(state: ServerState) -> Starlette:
    """The ASGI application over `state`, which may become ready later."""
    rows = routes(state)
    keys = read_keys(state.config)
    app = Starlette(
        routes=[_route(row) for row in rows],
        middleware=[*_cors(state.config), Middleware(RequestLog, figures=state.metrics.own, paths=[row.doc.path for row in rows]), Middleware(ErrorBoundary), *([Middleware(BearerAuth, keys=keys)] if keys else [])],
        exception_handlers={HTTPException: on_exception, PagodaError: on_exception},
    )
    app.router.redirect_slashes = False
    app.state.server = state
    app.state.openapi = None
    app.state.docs = [row.doc for row in rows]
    return app


def _cors(config: ServerConfig) -> list[Middleware]:
    """Other origins' pages get nothing unless --allowed-origins names them."""
    if not config.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=_list(config.allowed_origins),
            allow_credentials=config.allow_credentials,
            allow_methods=_list(config.allowed_methods),
            allow_headers=_list(config.allowed_headers),
            expose_headers=["X-Request-Id", "X-Pagoda-Warning", "Retry-After"],
        )
    ]


def _list(values: Sequence[str]) -> list[str]:
    """Words, or one JSON list, which is how vLLM takes them."""
    if len(values) == 1 and values[0].startswith("["):
        try:
            return [str(value) for value in json.loads(values[0])]
        except ValueError:
            raise ConfigError(f"`{values[0]}` is neither words nor a JSON list") from None
    return list(values)


def _route(row: Row) -> Route:
    path = row.doc.path.replace("{model}", "{model:path}")  # hub ids have a slash
    return Route(path, row.endpoint, methods=list(row.doc.methods))


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


async def _models(request: Request) -> Response:
    context, _ = health.state_of(request).get()
    return _json(list_models(context))


async def _model(request: Request) -> Response:
    context, _ = health.state_of(request).get()
    return _json(retrieve_model(request.path_params["model"], context))


async def _tokenizer_info(request: Request) -> Response:
    context, _ = health.state_of(request).get()
    return JSONResponse(tokenize.tokenizer_info(context))


_TOKENIZER_INFO = Row(RouteDoc(path="/tokenizer_info", methods=("GET",), summary="the tokenizer's configuration", errors=(401, 503)), _tokenizer_info)


async def _openapi(request: Request) -> Response:
    state = request.app.state
    if state.openapi is None:
        state.openapi = openapi(state.docs)
    return JSONResponse(state.openapi)


def _text_endpoint(work: Callable[[bytes, ModelContext], tuple[msgspec.Struct, list[str]]]) -> Callable[[Request], Any]:
    """An endpoint that needs the tokenizer but not the engine; the work runs off the event loop."""

    async def endpoint(request: Request) -> Response:
        state = health.state_of(request)
        context, _ = state.get()
        raw = await read_json_body(request.headers, request.receive, state.config.max_request_body_bytes)
        answer, warnings = await asyncio.get_running_loop().run_in_executor(state.pool, work, raw, context)
        if state.config.strict_fields:
            refuse_unknown(warnings)
        response = _json(answer)
        if warnings:
            response.headers["X-Pagoda-Warning"] = warning_header(warnings)
        return response

    return endpoint
