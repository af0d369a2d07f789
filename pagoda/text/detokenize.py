"""Token ids to text while they arrive.

The text of a sample is decode(prompt + output) without decode(prompt), handed out as early as it is certain: bytes
that may still become a character wait for the rest of it. However the ids are cut into calls, the pieces of text
join to the same string, and that string is the whole's decoding.

    BytesDetokenizer    decoders that only rename (see `text/pieces.py`): join bytes, read them as UTF-8
    WindowDetokenizer   all others: decode a short window twice, with and without the new tokens
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from pagoda.text.pieces import Pieces
from pagoda.text.tokenizer import Tokenizer

__all__ = ["BytesDetokenizer", "Detokenizer", "WindowDetokenizer", "make_detokenizer"]

_PRIMING_TOKENS = 8  # more than a character's bytes, and than a decoder looks back
_MAX_HELD_TOKENS = 16  # a character has at most four bytes; what is longer is no unfinished character
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        ...

    def flush(self) -> str:
        """What is still held, at the end of the sequence: an unfinished character is U+FFFD."""
        ...


def make_detokenizer(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int] = (),
    *,
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> Detokenizer:
    """The quicker of the two that is right for this tokenizer."""
    pieces = tokenizer.visible_pieces if skip_special_tokens else tokenizer.pieces
    if pieces is not None:
        return BytesDetokenizer(pieces, prompt_ids)
    return WindowDetokenizer(
        tokenizer,
        prompt_ids,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )


class BytesDetokenizer:
    """The prompt matters in two ways: it may end inside a character, and a text's first space may be silent."""

    __slots__ = ("_decode", "_pieces", "_strips_space")

    def __init__(self, pieces: Pieces, prompt_ids: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._decode = _Utf8Decoder("replace").decode
        tail = b"".join([pieces[token_id] for token_id in prompt_ids[-_PRIMING_TOKENS:]])
        self._strips_space = pieces.strips_space and not tail and not any(pieces[token_id] for token_id in prompt_ids)
        self._decode(_unfinished(tail))

    def feed(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        text = self._decode(b"".join([pieces[token_id] for token_id in token_ids]))
        if self._strips_space and text:
            self._strips_space = False
            return text[1:] if text[0] == " " else text
        return text

    def flush(self) -> str:
        return self._decode(b"", True)


def _unfinished(data: bytes) -> bytes:
    """The end of `data` that begins a character without ending it."""
    for length in range(1, min(3, len(data)) + 1):
        lead = data[-length]
        if lead & 0xC0 == 0x80:
            continue
        needed = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
        return data[-length:] if needed > length else b""
    return b""


class WindowDetokenizer:
    """Decodes `ids[start:]`, of which `ids[start:read]` has been handed out.

    The window keeps the tokens of the last piece of text, so that a decoder that looks at neighbours sees them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._ids = list(prompt_ids[-_PRIMING_TOKENS:])
        self._num_read = len(self._ids)

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self._step(token_id) for token_id in token_ids])

    def flush(self) -> str:
        return self._advance(self._text(self._ids[: self._num_read]), self._text(self._ids))

    def _step(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, now = self._text(self._ids[: self._num_read]), self._text(self._ids)
        is_held = now.endswith("\ufffd") or len(now) <= len(before)
        if is_held and len(self._ids) - self._num_read < _MAX_HELD_TOKENS:
            return ""
        return self._advance(before, now)

    def _advance(self, before: str, now: str) -> str:
        self._ids = self._ids[self._num_read :]
        self._num_read = len(self._ids)
        return now[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip, spaces_between_special_tokens=self._spaces)
