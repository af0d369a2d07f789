"""Whom `chat` and `complete` talk to: a server (`talk_http`) or a model in this process (`talk_local`).

Both take the same request body, OpenAI's:

    talker.stream("/v1/chat/completions", {"messages": [...], "temperature": 0}) -> pieces of the answer's text
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Protocol

__all__ = ["CHAT", "COMPLETIONS", "Talker"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class Talker(Protocol):
    """`name` is what the model is called."""

    name: str

    def stream(self, route: str, body: Mapping[str, Any]) -> Generator[str, None, None]:
        """Text as it comes. Closing the iterator ends the request. Raises PagodaError when it is refused or fails."""

    def close(self) -> None: ...
