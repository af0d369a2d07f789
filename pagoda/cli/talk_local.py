"""Talking to a model in this process: the server's parsers, the engine in a thread, the answer pulled piece by piece."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any

from pagoda.base.config import EngineConfig
from pagoda.cli.local import LocalModel, load_model
from pagoda.cli.talk import CHAT, COMPLETIONS
from pagoda.serve import openai_chat, openai_completions

__all__ = ["LocalTalker"]

_PARSERS = {CHAT: openai_chat.parse, COMPLETIONS: openai_completions.parse}


class LocalTalker:
    """Loads the model. Raises ConfigError, ModelFileError, UnsupportedModel or OutOfMemory."""

    def __init__(self, config: EngineConfig) -> None:
        self._runner = asyncio.Runner()
        self.model: LocalModel = load_model(config)
        self.name = self.model.name
        self._ids = itertools.count()

    def stream(self, route: str, body: Mapping[str, Any]) -> Generator[str, None, None]:
        call = _PARSERS[route](json.dumps({**body, "stream": True}).encode(), None, self.model.context)
        outputs = self.model.answer(call, f"talk-{next(self._ids)}")
        try:
            while (text := self._runner.run(_next_text(outputs))) is not None:
                yield text
        finally:
            self._runner.run(outputs.aclose())

    def close(self) -> None:
        self._runner.run(self.model.engine.shutdown())
        self._runner.close()


async def _next_text(outputs: AsyncGenerator[Any, None]) -> str | None:
    """The next piece, or None at the end."""
    async for output in outputs:
        return "".join(sample.text for sample in output.outputs)
    return None
