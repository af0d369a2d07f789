"""The bytes of each token, as the tokenizer's decoder would write them.

Nearly every generative model's decoder only renames: a byte-level one maps characters to bytes, a sentencepiece one
U+2581 to a space and `<0xXX>` to a byte. Then the text of a sequence is the join of its tokens' bytes, read as UTF-8,
which makes decoding one token a dictionary look-up. `pieces_of` returns None for decoders that do more than rename
(WordPiece, suffixes): they are run on windows of tokens instead, see `text/detokenize.py`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

__all__ = ["Pieces", "pieces_of"]

_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's naming of bytes: printable Latin-1 stands for itself, the other bytes for U+0100 onwards in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class Pieces(dict[int, bytes]):
    """Token id -> bytes, filled when asked for; b"" for ids that are not in the vocabulary.

    `strips_space`: the first space of a whole text is not written.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, is_byte_level: bool, strips_space: bool = False) -> None:
        super().__init__()
        self._id_to_token = backend.id_to_token
        self._is_byte_level = is_byte_level
        self.strips_space = strips_space

    def __missing__(self, token_id: int) -> bytes:
        token = self._id_to_token(token_id) if 0 <= token_id < 2**32 else None
        piece = b"" if token is None else self._bytes_of(token)
        self[token_id] = piece
        return piece

    def _bytes_of(self, token: str) -> bytes:
        if self._is_byte_level:
            try:
                return bytes([_BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # an added token with other characters, which stands for itself
                return token.encode()
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(match[1]) if match else token.replace(_SPACE, " ").encode()


def pieces_of(backend: tokenizers.Tokenizer) -> Pieces | None:
    """The table of this tokenizer, None where its decoder does more than rename."""
    if backend.decoder is None:
        return None
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces(backend, is_byte_level=True)
    if kinds == ["Metaspace"] and steps[0].get("replacement") == _SPACE:
        return None if _has_byte_tokens(backend) else Pieces(backend, is_byte_level=False, strips_space=_prepends(steps[0]))
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or steps[0]["pattern"] != {"String": _SPACE}:
        return None
    if steps[0]["content"] != " " or kinds[3:] not in ([], ["Strip"]):
        return None
    if kinds[3:] and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) != (" ", 1, 0):
        return None
    return Pieces(backend, is_byte_level=False, strips_space=bool(kinds[3:]))


def _prepends(step: dict[str, Any]) -> bool:
    return bool(step.get("prepend_scheme", "always") != "never")


def _has_byte_tokens(backend: tokenizers.Tokenizer) -> bool:
    return backend.token_to_id("<0x00>") is not None
