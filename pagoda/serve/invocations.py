"""POST /invocations, the one route of a SageMaker container: the body says what it is."""

from __future__ import annotations

import msgspec

from pagoda.base.errors import InvalidRequest
from pagoda.serve import openai_chat, openai_completions
from pagoda.serve.context import ModelContext
from pagoda.serve.errors import from_msgspec
from pagoda.serve.generation import Call

__all__ = ["parse"]


def parse(raw: bytes, given_id: str | None, context: ModelContext) -> Call:
    """A body with `messages` is a chat, one with `prompt` a completion. Raises InvalidRequest (400) or NotFound (404)."""
    try:
        names = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).keys()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise from_msgspec(exc) from None
    if "messages" in names:
        return openai_chat.parse(raw, given_id, context)
    if "prompt" in names:
        return openai_completions.parse(raw, given_id, context)
    raise InvalidRequest("the body needs `messages` (a chat) or `prompt` (a completion)", param="messages")
