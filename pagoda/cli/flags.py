"""Flags generated from the config dataclasses: a field is a flag, its metadata the help, its default the default.

`--config file.yaml` holds the same names (with - or _); the command line wins over it. Numbers may be human: 4k = 4000,
4K = 4096, 2g, 2G. An unknown flag is an error that names the nearest one.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from pagoda.base.errors import ConfigError
from pagoda.base.registry import nearest

__all__ = ["ArgumentParser", "add_config_flags", "config_from_args", "human_int"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def human_int(text: str) -> int:
    """`4096`, `4k` (4000), `4K` (4096), `1.5G`. ArgumentTypeError otherwise."""
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*([kmgtKMGT]?)(?:i?[bB])?", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"`{text}` is not a number (like 4096, 4k = 4000, 4K = 4096, 1.5G)")
    return int(float(found[1]) * _UNITS[found[2]]) if "." in found[1] or found[2] else int(found[1])


def _int_or_auto(text: str) -> int | str:
    return "auto" if text in ("auto", "-1") else human_int(text)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors that name the nearest flag, and defaults shown in the help."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        if found:
            known = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown flag `{found[1]}`{nearest(found[1], known)}; `{self.prog} --help` lists them"
        elif found := re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = re.findall(r"[\w-]+", found[2])
            message = f"unknown command `{found[1]}`{nearest(found[1], known)}; known: {', '.join(known)}"
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            parser = getattr(known, "_parser", self)
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return known


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("%", "%%").replace("%%(default)", "%(default)")
        default = action.default
        if action.option_strings and default not in (None, (), False, argparse.SUPPRESS) and "default" not in text:
            text += f" (default: {str(default).replace('%', '%%')})"
        return text


def add_config_flags(parser: argparse.ArgumentParser, config: type, *, title: str) -> None:
    """One flag per field of the dataclass, in a group of its own."""
    doc = (config.__doc__ or "").split("\n", 1)[0]
    group = parser.add_argument_group(title, doc)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if field.metadata.get("positional"):
            continue
        group.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, **_flag(field, hints[field.name]))


def _flag(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"help": field.metadata.get("help", ""), "default": field.default}
    if field.metadata.get("repeat"):
        return kwargs | {"nargs": "+", "metavar": field.metadata.get("metavar", "NAME")}
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    literals = [value for option in options if typing.get_origin(option) is Literal for value in typing.get_args(option)]
    if bool in options:
        return kwargs | {"action": argparse.BooleanOptionalAction}
    if int in options:
        kind = _int_or_auto if "auto" in literals else human_int
        return kwargs | {"type": kind, "metavar": field.metadata.get("metavar", "N")}
    if float in options:
        return kwargs | {"type": float, "metavar": field.metadata.get("metavar", "X")}
    if literals:
        return kwargs | {"choices": literals}
    return kwargs | {"metavar": field.metadata.get("metavar", field.name.rsplit("_", 1)[-1].upper())}


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def config_from_args(config: type, args: argparse.Namespace) -> Any:
    """The dataclass filled from parsed flags."""
    return config(**{f.name: getattr(args, f.name) for f in dataclasses.fields(config)})


def apply_config_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """`--config file.yaml`: its values become the parser's defaults, so that flags on the command line win."""
    path = _config_path(argv)
    if path is None:
        return
    import yaml  # only here: most starts read no file

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"`--config {path}` cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"`--config {path}` is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"`--config {path}` must hold `flag: value` lines")
    actions = {action.dest: action for action in parser._actions}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise ConfigError(f"`--config {path}`: unknown key `{key}`{nearest(name, sorted(actions))}")
        defaults[name] = _checked(parser, actions[name], value, f"`--config {path}`: `{key}`")
    parser.set_defaults(**defaults)


def _config_path(argv: Sequence[str]) -> str | None:
    for i, arg in enumerate(argv):
        if arg == "--config" and i + 1 < len(argv):
            return argv[i + 1]
        if arg.startswith("--config="):
            return arg.partition("=")[2]
    return None


def _checked(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, where: str) -> Any:
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {value!r}")
        return value
    if action.nargs == "+":
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    if value is None:
        return None
    try:
        checked = parser._get_value(action, str(value))
        parser._check_value(action, checked)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{where}: {error}") from None
    return checked
