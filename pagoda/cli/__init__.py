"""Floor 7: the `pagoda` command."""

from __future__ import annotations

from pagoda.cli.main import main

__all__ = ["main"]
