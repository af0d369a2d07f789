"""`pagoda serve [MODEL]`: the OpenAI-compatible server."""

from __future__ import annotations

import argparse

from pagoda.base.config import ServerConfig
from pagoda.base.log import setup_logging
from pagoda.cli.engine_flags import add_engine_flags, engine_config
from pagoda.cli.flags import add_config_flags, config_from_args

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    add_config_flags(parser, ServerConfig, title="server")


def run(args: argparse.Namespace) -> int:
    setup_logging()
    config, server = engine_config(args), config_from_args(ServerConfig, args)
    from pagoda.serve.launch import serve  # after the flags are known to be good: it starts processes

    return serve(config, server)
