"""The flags that `chat` and `complete` share: whom to talk to, and how tokens are chosen."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pagoda.base.config import changed_fields, field
from pagoda.base.errors import ConfigError
from pagoda.cli.engine_flags import add_engine_flags, engine_config
from pagoda.cli.flags import add_config_flags, config_from_args
from pagoda.cli.talk import Talker

__all__ = ["SamplingFlags", "add_talk_flags", "open_talker", "print_stream", "sampling_fields"]


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are chosen; what is not given is the model's own default."""

    max_tokens: int | None = field(None, "most tokens of an answer")
    temperature: float | None = field(None, "0: always the likeliest token")
    top_p: float | None = field(None, "draw from the likeliest tokens that together have this probability")
    top_k: int | None = field(None, "draw from that many likeliest tokens")
    min_p: float | None = field(None, "drop tokens less likely than this share of the likeliest one")
    repetition_penalty: float | None = field(None, "above 1: what was said becomes less likely")
    presence_penalty: float | None = field(None, "taken off the logits of tokens that were said")
    frequency_penalty: float | None = field(None, "the same, for each time they were said")
    stop: Sequence[str] = field((), "texts that end the answer", repeat=True, metavar="TEXT")


def add_talk_flags(parser: argparse.ArgumentParser, *, positional_model: bool) -> None:
    group = parser.add_argument_group("server", "talk to a server instead of loading the model here")
    group.add_argument("--url", metavar="URL", help="where the server is, such as http://127.0.0.1:8000")
    group.add_argument("--api-key", metavar="KEY", help="key for the server (or PAGODA_API_KEY)")
    group.add_argument("--model-name", metavar="NAME", help="model to ask the server for (default: its first)")
    add_config_flags(parser, SamplingFlags, title="sampling")
    add_engine_flags(parser, positional_model=positional_model)


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the request body that the user set."""
    given = dataclasses.asdict(config_from_args(SamplingFlags, args))
    given["stop"] = list(given["stop"]) or None
    given["seed"] = args.seed or None
    return {name: value for name, value in given.items() if value is not None}


def open_talker(args: argparse.Namespace) -> Talker:
    """The server of --url, or the model loaded in this process."""
    config = engine_config(args)
    if args.url is None:
        for name in ("api_key", "model_name"):
            if getattr(args, name) is not None:
                raise ConfigError(f"`--{name.replace('_', '-')}` is for a server; give its --url too")
        started = time.perf_counter()
        # Either half costs a fraction of a second of imports, and one of them is never needed.
        from pagoda.cli.talk_local import LocalTalker

        talker = LocalTalker(config)
        if sys.stderr.isatty():
            print(f"{talker.name}: loaded in {time.perf_counter() - started:.2f} s", file=sys.stderr)
        return talker
    if misplaced := sorted(changed_fields(config).keys() - {"model", "seed"}):
        raise ConfigError(f"`--{misplaced[0].replace('_', '-')}` is for loading a model here; with --url the server has loaded it")
    from pagoda.cli.talk_http import HttpTalker

    return HttpTalker(args.url, api_key=args.api_key, model=args.model_name or config.model.model)


def print_stream(pieces: Generator[str, None, None]) -> str:
    """Print the answer as it comes; the whole of it. Whatever stops us, the request ends too."""
    said = []
    with closing(pieces):
        for piece in pieces:
            print(piece, end="", flush=True)
            said.append(piece)
    print(flush=True)
    return "".join(said)
