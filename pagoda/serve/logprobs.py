"""Token logprobs in OpenAI's two shapes (chat: a list of objects, completions: parallel lists) and vLLM's prompt_logprobs."""

from __future__ import annotations

import msgspec

from pagoda.base.types import Logprob
from pagoda.serve.context import TokenizerLike

__all__ = [
    "ChatLogprobs",
    "CompletionLogprobs",
    "PromptLogprob",
    "TokenNamer",
    "TokenTop",
    "chat_logprobs",
    "completion_logprobs",
    "prompt_logprobs",
]

LOWEST = -9999.0  # JSON has no infinity

Position = dict[int, Logprob]
"""Token id -> Logprob: the chosen token and the most likely ones."""


class TokenTop(msgspec.Struct, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenChosen(TokenTop, kw_only=True):
    top_logprobs: list[TokenTop] = []


class ChatLogprobs(msgspec.Struct, kw_only=True):
    content: list[TokenChosen] | None = None
    refusal: list[TokenChosen] | None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []


class PromptLogprob(msgspec.Struct, kw_only=True):
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class TokenNamer:
    """How a token is written in an answer: its text, or `token_id:N` when the client asked for that."""

    def __init__(self, tokenizer: TokenizerLike, as_ids: bool) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def name(self, token_id: int, entry: Logprob | None = None) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        return self._tokenizer.token_str(token_id)

    def raw(self, token_id: int) -> list[int]:
        """The token's own bytes, which may be part of a character."""
        return list(self._tokenizer.token_bytes(token_id))


def _finite(value: float) -> float:
    return value if value > LOWEST else LOWEST


def _top(position: Position, num: int) -> list[tuple[int, Logprob]]:
    """The `num` (-1: all) most likely entries, best first; the chosen token is among them only on merit."""
    ranked = sorted(position.items(), key=lambda item: (-item[1].logprob, item[1].rank or 0))
    return ranked if num == -1 else ranked[:num]


def chat_logprobs(token_ids: list[int], positions: list[Position], num_top: int, namer: TokenNamer) -> ChatLogprobs:
    """One object per token with its `num_top` most likely alternatives."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=False):
        chosen = position[token_id]
        top = [
            TokenTop(token=namer.name(i, entry), logprob=_finite(entry.logprob), bytes=namer.raw(i))
            for i, entry in _top(position, num_top)
        ]
        content.append(
            TokenChosen(
                token=namer.name(token_id, chosen), logprob=_finite(chosen.logprob), bytes=namer.raw(token_id), top_logprobs=top
            )
        )
    return ChatLogprobs(content=content)


def _named_top(token_id: int, position: Position, num_top: int, namer: TokenNamer) -> dict[str, float]:
    """Text -> logprob of the most likely tokens, and of the chosen one wherever it ranks."""
    top = _top(position, num_top)
    if token_id in position and all(i != token_id for i, _ in top):
        top.append((token_id, position[token_id]))
    return {namer.name(i, entry): _finite(entry.logprob) for i, entry in top}


def completion_logprobs(
    token_ids: list[int], positions: list[Position | None], num_top: int, namer: TokenNamer, offset: int = 0
) -> tuple[CompletionLogprobs, int]:
    """Parallel lists, and the text offset (characters) after the last token. A position of None is the first prompt token."""
    out = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, position in zip(token_ids, positions, strict=False):
        entry = position.get(token_id) if position else None
        name = namer.name(token_id, entry)
        out.text_offset.append(offset)
        out.tokens.append(name)
        out.token_logprobs.append(_finite(entry.logprob) if entry else None)
        out.top_logprobs.append(_named_top(token_id, position, num_top, namer) if position else None)
        offset += len(name)
    return out, offset


def prompt_logprobs(positions: list[Position | None] | None) -> list[dict[str, PromptLogprob] | None] | None:
    """vLLM's shape: per prompt token, token id (as a string) -> logprob, rank, text; None for the first."""
    if positions is None:
        return None
    return [
        {
            str(i): PromptLogprob(logprob=_finite(e.logprob), rank=e.rank, decoded_token=e.decoded_token)
            for i, e in position.items()
        }
        if position is not None
        else None
        for position in positions
    ]
