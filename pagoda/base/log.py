"""One line per event, numbers with units. Everything goes to stderr; stdout belongs to results."""

from __future__ import annotations

import logging
import sys

from pagoda.base import env

__all__ = ["get_logger", "setup_logging"]


def get_logger(name: str) -> logging.Logger:
    """The logger `pagoda.<room>`; handlers are attached only by `setup_logging`."""
    return logging.getLogger(name if name.startswith("pagoda") else f"pagoda.{name}")


def setup_logging(level: str | None = None) -> None:
    """Attach one stderr handler to the `pagoda` logger. Called by the launcher and the CLI, never by the library."""
    logger = logging.getLogger("pagoda")
    logger.setLevel((level or env.log_level()).upper())
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%m-%d %H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
