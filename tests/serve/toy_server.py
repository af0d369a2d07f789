"""`python -m tests.serve.toy_server PORT MOOD SHUTDOWN_TIMEOUT UDS PROCESSES [SETTING=TEXT ...]`: the whole server, its engine process included, on a toy model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pagoda.base.config import EngineConfig, ServerConfig
from pagoda.base.errors import PagodaError
from pagoda.base.log import setup_logging
from pagoda.executor.front import Front
from pagoda.serve.launch import serve
from tests.executor.builders import toy_config
from tests.serve.fakes import PlainTemplate, byte_tokenizer


def load_toy(config: EngineConfig) -> Front:
    return Front(Path("/toy"), "toy", byte_tokenizer(), PlainTemplate(), {}, [257])  # type: ignore[arg-type]


def main() -> int:
    port, mood, timeout, uds, count, *more = sys.argv[1:]
    settings = dict(word.split("=") for word in more)
    queue = settings.pop("max_num_queued_reqs", None)
    config = toy_config(f"toy:{mood}")
    if queue is not None:
        config = replace(config, scheduler=replace(config.scheduler, max_num_queued_reqs=int(queue)))
    setup_logging("info")
    server = ServerConfig(port=int(port), shutdown_timeout=float(timeout), uds=uds or None, api_server_count=int(count), **settings)
    try:
        return serve(config, server, builder="tests.executor.builders:build", loader="tests.serve.toy_server:load_toy")
    except PagodaError as error:
        print(f"toy: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
