"""`pagoda COMMAND`: a table of commands; each imports what it needs only when it runs, so that --help is instant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from pagoda import __version__
from pagoda.base.errors import PagodaError
from pagoda.cli.flags import ArgumentParser, apply_config_file

__all__ = ["main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("pagoda.cli.serve", "serve a model over the OpenAI API"),
    "chat": ("pagoda.cli.chat", "talk to a model, or to a running server"),
    "complete": ("pagoda.cli.complete", "continue a text"),
    "run": ("pagoda.cli.run", "answer a file of requests offline (OpenAI batch format: JSONL in, JSONL out)"),
    "bench": ("pagoda.bench.cli", "measure: latency, throughput, serve, startup, quality"),
    "doctor": ("pagoda.cli.doctor", "what this machine has, what would be chosen and why, whether a model would run"),
    "fetch": ("pagoda.cli.fetch", "bring a model into the cache"),
}
"""name -> module with `add_arguments(parser)` and `run(args) -> exit code`, and one line of help."""

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
    parser = ArgumentParser(prog="pagoda", description="High-throughput inference and serving of language models.", epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("-v", "--version", action="version", version=f"pagoda {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((arg for arg in args if not arg.startswith("-")), None)
    for name, (module, help) in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if name == wanted:
            import_module(module).add_arguments(sub)
            sub.set_defaults(_parser=sub)
    try:
        if wanted in COMMANDS:
            apply_config_file(commands.choices[wanted], args)
        parsed = parser.parse_args(args)
        run: Callable[[argparse.Namespace], int] = import_module(COMMANDS[parsed.command][0]).run
        return run(parsed)
    except PagodaError as error:
        print(f"pagoda: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
