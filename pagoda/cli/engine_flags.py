"""The flags every command that builds an engine shares."""

from __future__ import annotations

import argparse

from pagoda.base.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagoda.base.errors import ConfigError
from pagoda.cli.flags import add_config_flags, config_from_args

__all__ = ["add_engine_flags", "engine_config"]

_GROUPS = {"model": ModelConfig, "cache": CacheConfig, "scheduler": SchedulerConfig, "device": DeviceConfig}


def add_engine_flags(parser: argparse.ArgumentParser, *, positional_model: bool = True) -> None:
    if positional_model:
        parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="as --model")
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags; the command line wins over it")
    for title, config in _GROUPS.items():
        add_config_flags(parser, config, title=title)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The config as the user gave it, unresolved."""
    positional = getattr(args, "model_positional", None)
    if positional and args.model and positional != args.model:
        raise ConfigError(f"the model is given twice: `{positional}` and `--model {args.model}`")
    args.model = args.model or positional
    return EngineConfig(**{name: config_from_args(config, args) for name, config in _GROUPS.items()})
