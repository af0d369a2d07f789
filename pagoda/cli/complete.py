"""`pagoda complete`: continue a text, given as an argument or on stdin; without either, texts are asked for one by one."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import Any

from pagoda.base.errors import ConfigError, RequestError
from pagoda.base.log import setup_logging
from pagoda.cli.talk import COMPLETIONS, Talker
from pagoda.cli.talk_flags import add_talk_flags, open_talker, print_stream, sampling_fields

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the text to continue (default: read from stdin)")
    parser.add_argument("-q", "--quick", metavar="PROMPT", help="as the argument")
    parser.add_argument("--echo", action="store_true", help="print the prompt too")
    add_talk_flags(parser, positional_model=False)


def run(args: argparse.Namespace) -> int:
    setup_logging("warning")
    if args.prompt is not None and args.quick is not None:
        raise ConfigError("the prompt is given twice: as an argument and with --quick")
    prompt = args.prompt if args.prompt is not None else args.quick
    fields = sampling_fields(args)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    with closing(open_talker(args)) as talker:
        if prompt is not None:
            _complete(talker, prompt, fields, echo=args.echo)
        else:
            _ask(talker, fields, echo=args.echo)
    return 0


def _complete(talker: Talker, prompt: str, fields: dict[str, Any], *, echo: bool) -> None:
    if echo:
        print(prompt, end="", flush=True)
    print_stream(talker.stream(COMPLETIONS, {"prompt": prompt, **fields}))


def _ask(talker: Talker, fields: dict[str, Any], *, echo: bool) -> None:
    while True:
        try:
            prompt = input("> ")
            if prompt:
                _complete(talker, prompt, fields, echo=echo)
        except EOFError:
            return
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("\n(stopped; Ctrl-D leaves)", flush=True)
