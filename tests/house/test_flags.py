"""Flags are a promise: a new, changed or lost one shows up here, and its line in flags.txt is changed on purpose."""

from __future__ import annotations

import argparse

from pagoda.cli.main import build_parser, chosen_parser
from tests.house.flags import FROZEN, commands, lines


def test_flags_are_frozen() -> None:
    frozen, found = FROZEN.read_text(encoding="utf-8").splitlines(), list(lines())
    lost, new = sorted(set(frozen) - set(found)), sorted(set(found) - set(frozen))
    assert found == frozen, f"lost: {lost}\nnew: {new}\nif that is meant: python -m tests.house.flags > {FROZEN.name}"


def test_every_flag_says_what_it_does() -> None:
    silent = [
        f"{' '.join(words)} {action.option_strings or action.dest}"
        for words in commands()
        for action in chosen_parser(build_parser(words))._actions
        if not isinstance(action, argparse._HelpAction) and not action.help
    ]
    assert not silent, silent


def test_flags_are_spelled_one_way() -> None:
    """A flag of two commands means the same: same kind of value."""
    kinds: dict[str, set[str]] = {}
    for words in commands():
        for action in chosen_parser(build_parser(words))._actions:
            for flag in action.option_strings:
                if flag not in ("--api-key", "--n"):  # several keys for a server, one for its client
                    kinds.setdefault(flag, set()).add(f"{type(action).__name__} {getattr(action.type, '__name__', 'str')} {action.nargs}")
    assert not {flag: found for flag, found in kinds.items() if len(found) > 1}
