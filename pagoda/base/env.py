"""The only reader of the environment. Ten variables at most; a bad value is an error, never ignored."""

from __future__ import annotations

import os
from pathlib import Path

from pagoda.base.errors import ConfigError

__all__ = ["VARIABLES", "api_key", "cache_dir", "hf_offline", "hf_token", "isa", "kernels", "log_level"]

VARIABLES = {
    "PAGODA_CACHE": "folder for the default model and built tokenizers (default: $XDG_CACHE_HOME/pagoda or ~/.cache/pagoda)",
    "PAGODA_ISA": "instruction set of the native kernels: portable, avx2, avx512, avx512_vnni, avx512_bf16 (default: the best there is)",
    "PAGODA_KERNELS": "native or reference (default: native when the library was built)",
    "PAGODA_LOG_LEVEL": "debug, info, warning or error (default: info)",
    "PAGODA_API_KEY": "API key of the server, as --api-key",
    "XDG_CACHE_HOME": "standard place of caches",
    "HF_HUB_OFFLINE": "1: never ask the hub, use cached files only",
    "HF_TOKEN": "token for gated hub repositories",
}


def _choice(name: str, allowed: tuple[str, ...]) -> str | None:
    value = os.environ.get(name, "").strip().lower()
    if not value:
        return None
    if value not in allowed:
        raise ConfigError(f"environment variable `{name}` is `{value}`; it must be one of {', '.join(allowed)}")
    return value


def cache_dir() -> Path:
    """Where Pagoda keeps what it downloaded or built."""
    if value := os.environ.get("PAGODA_CACHE"):
        return Path(value).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "pagoda"


def isa() -> str | None:
    return _choice("PAGODA_ISA", ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"))


def kernels() -> str | None:
    return _choice("PAGODA_KERNELS", ("native", "reference"))


def log_level() -> str:
    return _choice("PAGODA_LOG_LEVEL", ("debug", "info", "warning", "error")) or "info"


def api_key() -> str | None:
    return os.environ.get("PAGODA_API_KEY") or None


def hf_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def hf_token() -> str | None:
    return os.environ.get("HF_TOKEN") or None
