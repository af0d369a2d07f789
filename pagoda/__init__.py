"""Pagoda: a high-throughput inference and serving engine for large language models.

    from pagoda import LLM, SamplingParams
    LLM().generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagoda.api.async_engine import AsyncEngine
    from pagoda.api.llm import LLM
    from pagoda.base.types import CompletionOutput, RequestOutput, SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputsParams", "__version__"]

_HOMES = {
    "LLM": "pagoda.api.llm",
    "AsyncEngine": "pagoda.api.async_engine",
    "CompletionOutput": "pagoda.base.types",
    "RequestOutput": "pagoda.base.types",
    "SamplingParams": "pagoda.base.types",
    "StructuredOutputsParams": "pagoda.base.types",
}


def __getattr__(name: str) -> Any:
    """Names load on first use, so that `import pagoda` costs milliseconds."""
    if name not in _HOMES:
        raise AttributeError(f"module `pagoda` has no attribute `{name}`")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
