"""The running server: uvicorn, the engine behind it, signals, and the end.

    start      listen at once (503 while loading), load the tokenizer here while weights load there, then announce
    SIGTERM    stop accepting, let what runs finish for --shutdown-timeout, abort the rest (each gets its end), leave with 0
    again      abort everything now
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import logging
import os
import shlex
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import uvicorn
import uvloop
from starlette.types import Scope

from pagoda.api.async_engine import AsyncEngine
from pagoda.api.processor import Processor, sampling_defaults
from pagoda.base.config import EngineConfig, ServerConfig, changed_fields
from pagoda.base.errors import InvalidRequest, ModelFileError, PagodaError
from pagoda.base.log import get_logger
from pagoda.executor.channel import EngineInfo
from pagoda.executor.front import Front
from pagoda.executor.process import EngineHandle, EngineProcess, ProcessClient
from pagoda.serve.admin import describe_server
from pagoda.serve.app import build_app, routes
from pagoda.serve.auth import OPEN_PATHS, read_keys
from pagoda.serve.checks import template_kwargs
from pagoda.serve.context import ModelContext, ServerState
from pagoda.serve.metrics import StatsLog
from pagoda.text.message import choose
from pagoda.text.template import ChatTemplate

__all__ = ["Server", "announcement", "cut_connection", "imported", "model_context", "run", "tls_options"]

logger = get_logger("serve")

_LAST_SECONDS = 5.0  # between aborting what runs and giving up on clients that do not take their end
_QUIET_SECONDS = 1.0
_KEEP_ALIVE_SECONDS = 60  # longer than what clients' pools wait before they reuse a connection


def run(
    config: EngineConfig,
    server: ServerConfig,
    process: EngineProcess,
    listener: socket.socket,
    *,
    loader: str,
) -> int:
    """Serve on `listener` until told to stop. Returns the exit code; errors of loading are raised."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Server(config, server, imported(loader)).serve(process, listener))


def imported(name: str) -> Any:
    """What "module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: it would end by the signal, and we end with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One process's server, from loading to its end."""

    def __init__(
        self,
        config: EngineConfig,
        server: ServerConfig,
        load: Callable[[EngineConfig], Front],
        *,
        front: int = 0,
        figures_dir: str | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        """With `front` it is one of several: then signals are not its own to handle, nor is the line of figures."""
        self._config, self._server, self._load = config, server, load
        self._is_only, self._announce = front == 0, announce or _print
        self._state = ServerState(server, figures_dir=figures_dir, front=front)
        self._engine: AsyncEngine | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._state.drop_connection = lambda scope: cut_connection(self._uvicorn, scope)
        level = server.uvicorn_log_level
        _share_log_handlers(level)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                build_app(self._state),
                log_config=None,
                log_level=level,
                access_log=level in ("info", "debug"),
                http="httptools",
                ws="none",
                lifespan="off",
                root_path=server.root_path,
                timeout_graceful_shutdown=server.shutdown_timeout + _LAST_SECONDS,  # type: ignore[arg-type]
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                server_header=False,
                **tls_options(server),
            )
        )

    async def serve(self, process: EngineHandle, listener: socket.socket) -> int:
        client = ProcessClient(process)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT) if self._is_only else ():
            loop.add_signal_handler(number, self.stop)
        if self._state.metrics.shared is not None:
            self._spawn(self._state.metrics.shared.keep_written())
        http = asyncio.create_task(self._uvicorn.serve(sockets=[listener]))
        loading = asyncio.create_task(self._bring_up(client, listener))
        try:
            await asyncio.wait({http, loading}, return_when=asyncio.FIRST_COMPLETED)
            if not http.done():
                await loading  # raises what loading met
            await http
            return 0
        finally:
            await self._tear_down(client, http, loading)

    async def _bring_up(self, client: ProcessClient, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reading = loop.run_in_executor(self._state.pool, self._load, self._config)
        try:
            info = await client.wait_ready()
        except PagodaError:
            with contextlib.suppress(PagodaError):
                await reading
            raise
        front = await reading
        if self._uvicorn.should_exit:
            return
        context = model_context(front, info, self._server)
        generation_config, eos_ids = front.generation_config, front.eos_token_ids
        processor = Processor(info.config, info.facts, front.tokenizer, generation_config=generation_config, eos_token_ids=eos_ids)
        self._engine = AsyncEngine(client, processor, max_pending_nbytes=self._server.stream_buffer_bytes or None)
        self._state.ready(context, self._engine)
        if self._state.recorder is not None:
            self._state.recorder.begin(changed_fields(replace(self._config, model=replace(self._config.model, hf_token=None))))
        self._announce(announcement(context, info, self._server, listener, self._paths()))
        self._spawn(self._warm_up(self._engine))
        if self._is_only and not self._server.disable_log_stats:
            self._spawn(self._log_stats())

    def _paths(self) -> list[str]:
        return [f"{'/'.join(row.doc.methods)} {row.doc.path}" for row in routes(self._state)]

    async def _warm_up(self, engine: AsyncEngine) -> None:
        """In the first quiet second: reading a vocabulary for grammars holds up everybody for a tenth of a second."""
        idle = 0
        while idle < 2:
            await asyncio.sleep(_QUIET_SECONDS / 2)
            idle = 0 if self._state.active else idle + 1
        with contextlib.suppress(PagodaError):  # a request that needs a grammar will be told
            await engine.warm_up_grammars()

    async def _log_stats(self) -> None:
        log = StatsLog(self._state.metrics)
        while True:
            await asyncio.sleep(StatsLog.INTERVAL)
            await self._state.refresh_metrics()
            log.emit()

    def stop(self) -> None:
        """A signal came: what runs may finish; at once when it comes again."""
        if self._uvicorn.should_exit:
            logger.info("stopping now: %d requests are aborted", len(self._state.active))
            self._spawn(self._state.abort_all())
            self._uvicorn.force_exit = True
            return
        seconds = self._server.shutdown_timeout
        if self._state.active:
            logger.info("stopping: %d requests may finish within %.0f s (again to abort them)", len(self._state.active), seconds)
        self._state.drain()
        self._uvicorn.should_exit = True
        self._spawn(self._abort_later(seconds))

    async def _abort_later(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self._state.abort_all()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tear_down(self, client: ProcessClient, *tasks: asyncio.Task[None]) -> None:
        for task in (*tasks, *self._tasks):
            task.cancel()
        await asyncio.gather(*tasks, *self._tasks, return_exceptions=True)
        if self._engine is not None:
            await self._engine.shutdown()
        client.close()
        self._state.close()


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cut_connection(server: uvicorn.Server, scope: Scope) -> None:
    """End a connection whose buffers are full: closing it politely would keep them until its reader comes back."""
    for protocol in list(server.server_state.connections):
        if getattr(protocol, "scope", None) is scope:
            if (sock := protocol.transport.get_extra_info("socket")) is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, and nothing kept
            protocol.transport.abort()


def tls_options(server: ServerConfig) -> dict[str, Any]:
    """uvicorn's options for HTTPS; none without a certificate."""
    if server.ssl_certfile is None:
        return {}
    needs = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}[server.ssl_cert_reqs]
    paths = {name: getattr(server, name) for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs")}
    return {**{name: os.path.expanduser(path) for name, path in paths.items() if path is not None}, "ssl_cert_reqs": needs}


def _share_log_handlers(level: str) -> None:
    """uvicorn's lines look like ours and go to the same place."""
    theirs = logging.getLogger("uvicorn")
    theirs.handlers, theirs.propagate = get_logger("pagoda").handlers, False
    theirs.setLevel(level.upper())


def model_context(front: Front, info: EngineInfo, server: ServerConfig) -> ModelContext:
    """What parsers may know, from the two halves of a loaded model."""
    m = info.config.model
    assert isinstance(m.max_model_len, int)
    tool_parser = server.tool_call_parser if server.enable_auto_tool_choice else "none"
    chosen = choose(tool_parser, server.reasoning_parser, front.template)
    return ModelContext(
        model_names=tuple(m.served_model_name) or (front.name,),
        model_path=str(front.path),
        max_model_len=m.max_model_len,
        max_logprobs=m.max_logprobs,
        tokenizer=front.tokenizer,
        template=front.template,
        default_params=sampling_defaults(front.generation_config),
        response_role=server.response_role,
        tells_timings=server.enable_per_request_metrics,
        forces_usage=server.enable_force_include_usage,
        names_tokens_by_id=server.return_tokens_as_token_ids,
        default_template_kwargs=template_kwargs(server),
        make_template=_template_maker(front.tokenizer.special_tokens) if server.trust_request_chat_template else None,
        tool_format=chosen.tools,
        reasoning_format=chosen.reasoning,
        derived_format=chosen.derived,
        created=int(time.time()),
        server_info=describe_server(
            info.config, server, model=front.name, num_gpu_blocks=info.num_blocks - 1, kv_cache_size_tokens=info.num_kv_tokens,
            kv_cache_max_concurrency=round(info.max_concurrency, 2), report=list(info.report),
        ),
        cache_facts={
            **{key: value for key, value in asdict(info.config.cache).items() if value is not None},
            "num_gpu_blocks": info.num_blocks - 1,
            "kv_cache_size_tokens": info.num_kv_tokens,
            "kv_cache_max_concurrency": round(info.max_concurrency, 2),
        },
    )


def _template_maker(special_tokens: Mapping[str, str]) -> Callable[[str], ChatTemplate]:
    """Templates of requests; those used last are kept compiled."""

    @functools.lru_cache(maxsize=32)
    def make(text: str) -> ChatTemplate:
        try:
            return ChatTemplate({"default": text}, special_tokens)
        except ModelFileError as error:
            raise InvalidRequest(f"`chat_template` cannot be used: {error}", param="chat_template") from None

    return make


def announcement(context: ModelContext, info: EngineInfo, server: ServerConfig, listener: socket.socket, paths: list[str]) -> str:
    """What the terminal shows once requests are taken: the engine's report, where it listens, and a line to try."""
    host, port = ("", 0) if server.uds is not None else listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)
    scheme = "http" if server.ssl_certfile is None else "https"
    base, flags = (f"{scheme}://{reachable}:{port}", "") if server.uds is None else ("http://localhost", f"--unix-socket {shlex.quote(server.uds)} ")
    lines = [*info.report, f"Routes: {', '.join(paths)}"]
    if read_keys(server):
        flags += '-H "Authorization: Bearer $PAGODA_API_KEY" '
        lines.append(f"Open without a key: {', '.join(sorted(OPEN_PATHS))}")
    question = "What is the capital of France?"
    if context.template is not None:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": question}], "max_tokens": 32, "temperature": 0}
    else:
        path, body = "/v1/completions", {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
    where = f"{scheme}://{shown}:{port}" if server.uds is None else f"unix:{server.uds}"
    return "\n".join(
        [
            *lines,
            f"Serving {context.model_names[0]} on {where}",
            "Try:",
            f"  curl {flags}{base}{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
        ]
    )
