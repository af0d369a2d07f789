"""Logits processors from outside: any class with the two methods of `LogitsStep`.

    class Shout:
        def wants(self, params): return bool((params.extra_args or {}).get("shout"))
        def apply(self, logits_V, row): logits_V[row.params.extra_args["shout"]] += 5

They are named by `--logits-processors package.module:Class`, or come with an installed package that has an entry point
`logits.<name>` in the group `pagoda.plugins`. Requests talk to them through `extra_args` (`vllm_xargs` over HTTP).
One that raises ends the request whose row it was given, and nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import numpy as np

from pagoda.base.errors import ConfigError
from pagoda.base.log import get_logger
from pagoda.base.types import SamplingParams
from pagoda.worker.logits.step import LogitsStep, RowContext

__all__ = ["GROUP", "ProcessorFailed", "load_processors"]

GROUP = "pagoda.plugins"
_PREFIX = "logits."

_log = get_logger("worker")


class ProcessorFailed(Exception):
    """A plug-in raised, or left something that is no row of logits. It costs one request."""


class _Guarded:
    """A plug-in whose errors belong to one request."""

    def __init__(self, name: str, inner: LogitsStep) -> None:
        self._name, self._inner = name, inner

    def wants(self, params: SamplingParams) -> bool:
        """True where the plug-in raises: `apply` will say so, to the request."""
        try:
            return bool(self._inner.wants(params))
        except Exception as error:
            _log.error("logits processor `%s` failed in `wants`: %s: %s", self._name, type(error).__name__, error)
            return True

    def apply(self, logits_V: Any, row: RowContext) -> None:
        try:
            if self._inner.wants(row.params):
                self._inner.apply(logits_V, row)
        except Exception as error:
            raise ProcessorFailed(f"logits processor `{self._name}` failed: {type(error).__name__}: {error}") from error
        if np.isnan(logits_V).any():
            raise ProcessorFailed(f"logits processor `{self._name}` made logits that are not numbers")


def load_processors(names: Sequence[str] = ()) -> tuple[LogitsStep, ...]:
    """Those of installed packages by name, then those of the flag in its order. Raises ConfigError for one that cannot be used."""
    found = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    loaded = [_made(entry.name, entry.load) for entry in found if entry.name.startswith(_PREFIX)]
    return (*loaded, *(_made(name, lambda name=name: _imported(name)) for name in names))


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module or not attribute:
        raise ConfigError(f"`--logits-processors {name}`: write it as `package.module:Class`")
    return getattr(importlib.import_module(module), attribute)


def _made(name: str, load: Any) -> LogitsStep:
    try:
        made = load()()
    except ConfigError:
        raise
    except Exception as error:  # whatever somebody else's module raises while it is imported
        raise ConfigError(f"logits processor `{name}` cannot be loaded: {type(error).__name__}: {error}") from error
    missing = [method for method in ("wants", "apply") if not callable(getattr(made, method, None))]
    if missing:
        raise ConfigError(f"logits processor `{name}` has no method `{'` and no `'.join(missing)}`")
    return _Guarded(name, made)
