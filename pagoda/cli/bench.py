"""`pagoda bench COMMAND`: the table of measurements.

A measurement is a module of `pagoda.bench` with a frozen dataclass `Options`, whose fields become flags like those of
any config, and `measure(options, config) -> Report`.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from pagoda.base.log import setup_logging
from pagoda.cli.engine_flags import add_engine_flags, engine_config
from pagoda.cli.flags import add_config_flags, config_from_args

__all__ = ["COMMANDS", "Measurement", "load"]

COMMANDS = {
    "latency": ("pagoda.bench.latency", "how long one batch of equal requests takes"),
    "throughput": ("pagoda.bench.throughput", "how many requests and tokens a second, offline"),
    "engine": ("pagoda.bench.engine", "tokens a second, latencies and bandwidth of the engine alone, also with random weights of a known shape"),
    "serve": ("pagoda.bench.serve", "what the clients of a server see: time to first token, time per token, throughput"),
    "startup": ("pagoda.bench.startup", "how long from process launch to ready and to the first token"),
    "quality": ("pagoda.bench.quality", "perplexity, and divergence from a float32 run of the same weights"),
}


class Measurement:
    """A module of `pagoda.bench` as a command."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        title = self._module.__name__.rpartition(".")[2]
        add_config_flags(parser, self._module.Options, title=title)
        parser.add_argument("--output-json", type=Path, metavar="FILE", help="also write the figures there as JSON")
        add_engine_flags(parser)

    def run(self, args: argparse.Namespace) -> int:
        setup_logging()
        report = self._module.measure(config_from_args(self._module.Options, args), engine_config(args))
        report.show()
        if args.output_json:
            report.write(args.output_json)
        return 0 if report.is_ok else 1


def load(module_name: str) -> Measurement:
    return Measurement(import_module(module_name))
