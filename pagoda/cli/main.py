"""`pagoda COMMAND`: a table of commands; each imports what it needs only when it runs, so that --help is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from pagoda import __version__
from pagoda.base.errors import PagodaError
from pagoda.cli.flags import ArgumentParser, apply_config_file

__all__ = ["COMMANDS", "Commands", "build_parser", "chosen_parser", "main"]

Commands = Mapping[str, tuple[str, str]]
"""name -> module with `add_arguments(parser)` and `run(args) -> exit code`, or with a table of its own; one line of help."""

COMMANDS: Commands = {
    "serve": ("pagoda.cli.serve", "serve a model over the OpenAI API"),
    "chat": ("pagoda.cli.chat", "talk to a model, or to a running server"),
    "complete": ("pagoda.cli.complete", "continue a text"),
    "run": ("pagoda.cli.run", "answer a file of requests offline (OpenAI batch format: JSONL in, JSONL out)"),
    "bench": ("pagoda.cli.bench", "measure: latency, throughput, serve, startup, quality"),
    "doctor": ("pagoda.cli.doctor", "what this machine has, what would be chosen and why, whether a model would run"),
    "fetch": ("pagoda.cli.fetch", "bring a model into the cache"),
}

EPILOG = """examples:
  pagoda serve                                  the default model on http://127.0.0.1:8000
  pagoda serve Qwen/Qwen3-0.6B --port 9000      a model of the Hugging Face hub
  pagoda serve ./model.gguf --max-model-len 4K
  pagoda chat                                   talk to it without a server
  pagoda doctor                                 what would be chosen here, and why
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. A PagodaError ends it with one line and exit code 1, wrong usage with 2, Ctrl-C with 130."""
    args = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(args)
    try:
        parsed = _parse(parser, args)
        run: Callable[[argparse.Namespace], int] = parsed._run
        return run(parsed)
    except PagodaError as error:
        print(f"pagoda: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read us has gone; without this the interpreter would complain when it flushes at its end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0


def build_parser(args: Sequence[str]) -> ArgumentParser:
    """The parser of every command named in `args`; the others are only listed, so that nothing of them is imported."""
    parser = ArgumentParser(prog="pagoda", description="High-throughput inference and serving of language models.", epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-v", "--version", action="version", version=f"pagoda {__version__}")
    _add_commands(parser, COMMANDS, [arg for arg in args if not arg.startswith("-")])
    return parser


def _add_commands(parser: ArgumentParser, table: Commands, words: Sequence[str], load: Callable[[str], Any] = import_module) -> None:
    """What a row loads has `add_arguments(parser)` and `run(args)`, or `COMMANDS` and `load`: a table of its own."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module_name, help) in table.items():
        sub = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if not words or name != words[0]:
            continue
        module = load(module_name)
        if hasattr(module, "COMMANDS"):
            _add_commands(sub, module.COMMANDS, words[1:], module.load)
        else:
            module.add_arguments(sub)
            sub.set_defaults(_parser=sub, _run=module.run)
        parser.set_defaults(_chosen=sub)


def chosen_parser(parser: ArgumentParser) -> ArgumentParser:
    """The innermost parser that `build_parser` filled: the command's own."""
    while isinstance(deeper := parser.get_default("_chosen"), ArgumentParser):
        parser = deeper
    return parser


def _parse(parser: ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    chosen = chosen_parser(parser)
    if chosen.get_default("_run") is not None:
        apply_config_file(chosen, args)
    parsed: argparse.Namespace = parser.parse_args(args)
    return parsed
