"""Every command and flag, one line each; the engine's, which most commands have, once.

`python -m tests.house.flags > tests/house/flags.txt` freezes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from pagoda.cli import bench
from pagoda.cli.engine_flags import add_engine_flags
from pagoda.cli.flags import ArgumentParser
from pagoda.cli.main import COMMANDS, build_parser, chosen_parser
from tests.house.source import ROOT

FROZEN = ROOT / "tests/house/flags.txt"


def commands() -> Iterator[tuple[str, ...]]:
    """The words of every command."""
    for name in COMMANDS:
        if name == "bench":
            yield from ((name, inner) for inner in bench.COMMANDS)
        else:
            yield (name,)


def lines() -> Iterator[str]:
    parser = ArgumentParser(prog="engine", add_help=False)
    add_engine_flags(parser, positional_model=False)
    engine = [_shown(action) for action in parser._actions]
    yield from (f"{'(engine)':<16} {shown}" for shown in engine)
    for words in commands():
        own = [_shown(action) for action in chosen_parser(build_parser(words))._actions if not isinstance(action, argparse._HelpAction)]
        name = " ".join(words)
        if set(engine) <= set(own):
            own = [shown for shown in own if shown not in engine]
            yield f"{name:<16} (engine)"
        yield from (f"{name:<16} {shown}" for shown in own)


def _shown(action: argparse.Action) -> str:
    name = " ".join(action.option_strings) or str(action.metavar or action.dest)
    takes = "|".join(map(str, action.choices)) if action.choices else "" if action.nargs == 0 else str(action.metavar or action.dest)
    default = "" if action.default is None else f"= {action.default}"
    return " ".join(part for part in (name, takes if action.option_strings else "", default) if part)


if __name__ == "__main__":
    print("\n".join(lines()))
