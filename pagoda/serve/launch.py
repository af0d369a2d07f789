"""`serve`: from two configs to a running server, and its exit code.

The order is for speed: the port is taken (or refused) first, then the engine process starts loading weights, and only then this process
imports its HTTP libraries and loads its tokenizer, on another core.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from dataclasses import replace
from pathlib import Path

from pagoda.base.config import EngineConfig, ServerConfig
from pagoda.base.errors import ConfigError
from pagoda.base.log import get_logger
from pagoda.executor.process import BUILDER, EngineProcess
from pagoda.files.hub import resolve
from pagoda.serve.checks import check_files, check_processes, template_kwargs

__all__ = ["bind", "serve"]

_BACKLOG = 2048
LOADER = "pagoda.executor.front:load_front"
DEFAULT_QUEUE = 4096  # requests that may wait


def serve(config: EngineConfig, server: ServerConfig, *, builder: str = BUILDER, loader: str = LOADER) -> int:
    """Serve until SIGTERM or Ctrl-C; 0 after an orderly end.

    Raises ConfigError when the address cannot be had, and what loading the model raises. `builder` makes the engine in its process,
    `loader` tokenizer and template in each that speaks HTTP (both "module:function").
    """
    check_files(server)
    template_kwargs(server)
    config = _with_bounded_queue(config)
    check_processes(server)
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(contextlib.closing(listener)) for listener in bind(server)]
        _download(config)
        process = EngineProcess.start(config, builder=builder, log_level=_log_level())
        try:
            if server.api_server_count > 1:
                from pagoda.serve.supervisor import supervise

                return supervise(config, server, process, listeners, loader=loader, log_level=_log_level())
            from pagoda.serve.server import run  # a third of a second of imports, while weights load next door

            return run(config, server, process, listeners[0], loader=loader)
        finally:
            process.stop()
            if server.uds is not None:
                _remove_socket(server.uds)


def _with_bounded_queue(config: EngineConfig) -> EngineConfig:
    """A server whose queue has no end only makes everybody wait."""
    if config.scheduler.max_num_queued_reqs is not None:
        return config
    return replace(config, scheduler=replace(config.scheduler, max_num_queued_reqs=DEFAULT_QUEUE))


def _download(config: EngineConfig) -> None:
    """A model of the hub is brought here before two processes ask for it: one progress bar, one clear error."""
    m = config.model
    if m.model and "/" in m.model and not Path(m.model).expanduser().exists():
        resolve(m.model, revision=m.revision, token=m.hf_token, download_dir=m.download_dir)


def _log_level() -> str:
    """The engine process logs as much as this one."""
    names = {10: "debug", 20: "info", 30: "warning", 40: "error"}
    return names.get(get_logger("pagoda").getEffectiveLevel(), "info")


def bind(server: ServerConfig) -> list[socket.socket]:
    """The listening sockets, one for each API process; of a Unix socket all are the same one. Raises ConfigError with the remedy."""
    count = server.api_server_count
    if server.uds is not None:
        return [_bind_uds(server.uds)] * count
    try:
        family, _, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if count == 1:
            return [socket.create_server(address[:2], family=family, backlog=_BACKLOG)]
        with socket.create_server(address[:2], family=family) as probe:  # which is refused where others listen
            port = probe.getsockname()[1]
        return [socket.create_server((address[0], port), family=family, backlog=_BACKLOG, reuse_port=True) for _ in range(count)]
    except OSError as exc:
        where = f"{server.host}:{server.port}"
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {server.port} on {server.host} is in use; stop what listens there, or choose another with --port") from None
        raise ConfigError(f"cannot listen on {where}: {exc.strerror or exc}") from None


def _bind_uds(path: str) -> socket.socket:
    """A socket file that nobody answers at is left over from a server that died, and is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise ConfigError(f"another server listens on `{path}`; stop it, or choose another path with --uds")
            _remove_socket(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        raise ConfigError(f"cannot listen on `{path}`: {exc.strerror or exc}") from None
    except ConfigError:
        listener.close()
        raise
    return listener


def _remove_socket(path: str) -> None:
    """Only a socket is removed: never somebody's file."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
