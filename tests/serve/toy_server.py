"""`python -m tests.serve.toy_server PORT MOOD SHUTDOWN_TIMEOUT [UDS]`: the whole server, its engine process included, on a toy model."""

from __future__ import annotations

import sys
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
    port, mood, timeout, *uds = sys.argv[1:]
    setup_logging("info")
    server = ServerConfig(port=int(port), shutdown_timeout=float(timeout), uds=uds[0] if uds else None)
    try:
        return serve(toy_config(f"toy:{mood}"), server, builder="tests.executor.builders:build", load=load_toy)
    except PagodaError as error:
        print(f"toy: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
