"""What of the server's settings can be wrong in itself: said before anything is started."""

from __future__ import annotations

import json
import os
from typing import Any

from pagoda.base.config import ServerConfig
from pagoda.base.errors import ConfigError

__all__ = ["check_files", "check_processes", "template_kwargs"]


def check_files(server: ServerConfig) -> None:
    """Raises ConfigError for a key, certificate or list of keys that cannot be read, before anything is started."""
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "api_key_file"):
        path = getattr(server, name)
        if path is not None and not os.access(os.path.expanduser(path), os.R_OK):
            raise ConfigError(f"`--{name.replace('_', '-')} {path}` cannot be read")
    if server.ssl_keyfile is not None and server.ssl_certfile is None:
        raise ConfigError("`--ssl-keyfile` needs --ssl-certfile")


def check_processes(server: ServerConfig) -> None:
    """Raises ConfigError where --api-server-count cannot be had."""
    if server.api_server_count < 1:
        raise ConfigError(f"`--api-server-count {server.api_server_count}` must be at least 1")
    if server.api_server_count > 1 and server.record_arrivals is not None:
        raise ConfigError("`--record-arrivals` writes one file from one process: it cannot be had with `--api-server-count` above 1")


def template_kwargs(server: ServerConfig) -> dict[str, Any]:
    """--default-chat-template-kwargs. Raises ConfigError."""
    text = server.default_chat_template_kwargs
    try:
        found = {} if text is None else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"`--default-chat-template-kwargs` is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("`--default-chat-template-kwargs` must be a JSON object")
    return found
