"""Sentencepiece BPE vocabularies, from a GGUF file's arrays or from a `tokenizer.model`, without that library.

Such a vocabulary has scores where byte-pair encoding has merges: two neighbours join when their join is a token, the
best score first. The same merges in the words of BPE: every split of each token into two tokens, in the order of the
token's score.

`tokenizer.model` is a protobuf message of which three fields matter: 1 = pieces (1 = text, 2 = score, 3 = type),
2 = how it was trained (3 = kind), 3 = how text is normalized (3 = whether a space is put in front).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from pagoda.base.errors import ModelFileError

__all__ = ["SPACE", "SentencePieceModel", "TokenType", "add_tokens", "build_bpe", "build_sentencepiece", "read_sentencepiece"]
__all__ += ["spaced_decoder"]

SPACE = "\u2581"
_KIND_BPE = 2


class TokenType:
    """What a token is for; the numbers of sentencepiece, which GGUF shares."""

    NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class SentencePieceModel(NamedTuple):
    pieces: list[str]
    scores: np.ndarray
    types: np.ndarray
    has_prefix: bool


def build_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: object) -> tokenizers.Tokenizer:
    """A BPE tokenizer. Raises ModelFileError where merges and vocabulary contradict each other."""
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library raises nothing more precise
        raise ModelFileError(f"the merges do not fit the vocabulary ({error}); the file is corrupt") from error


def build_sentencepiece(
    vocab: dict[str, int], scores: np.ndarray, *, unk_token: str | None, has_prefix: bool
) -> tokenizers.Tokenizer:
    """`has_prefix`: a space is put in front of each text, and taken away in decoding."""
    merges = _merges_by_score(vocab, scores)
    backend = build_bpe(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token=unk_token)
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if has_prefix else replace
    backend.decoder = spaced_decoder(strip=has_prefix)
    return backend


def spaced_decoder(*, strip: bool) -> decoders.Decoder:
    """U+2581 to space, `<0xXX>` to bytes; `strip`: without the first space of the text."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: np.ndarray) -> None:
    """Mark the tokens that are found in a text before it is split; control and unknown ones are special."""
    special = np.flatnonzero((types == TokenType.CONTROL) | (types == TokenType.UNKNOWN)).tolist()
    plain = np.flatnonzero(types == TokenType.USER_DEFINED).tolist()
    backend.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in special if tokens[i]])
    backend.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in plain if tokens[i]])


def _merges_by_score(vocab: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Every way to make a token from two, best token first; ways of one token in the order of their left part's id."""
    merges: list[tuple[str, str]] = []
    tokens = list(vocab)
    for token_id in np.argsort(-scores, kind="stable").tolist():
        token = tokens[token_id]
        ways = [(token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in vocab and token[at:] in vocab]
        merges.extend(sorted(ways, key=lambda way: vocab[way[0]]) if len(ways) > 1 else ways)
    return merges


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Parse a `tokenizer.model`. Raises ModelFileError where it is corrupt or its kind is not BPE."""
    data = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    kind, has_prefix = 1, True
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                pieces.append(piece[1].decode())  # type: ignore[union-attr]
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])  # type: ignore[arg-type]
                types.append(int(piece.get(3, 1)))
            elif number == 2 and isinstance(value, bytes):
                kind = int(dict(_fields(value)).get(3, 1))
            elif number == 3 and isinstance(value, bytes):
                has_prefix = bool(dict(_fields(value)).get(3, 1))
    except (ValueError, KeyError, AttributeError, TypeError, IndexError, struct.error) as error:
        raise ModelFileError(f"not a sentencepiece model ({error}); fetch it again", path=path) from error
    if kind != _KIND_BPE:
        raise ModelFileError(
            "the sentencepiece model is not of the BPE kind; add a tokenizer.json to the folder "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers writes one)",
            path=path,
        )
    if len(set(pieces)) != len(pieces):
        raise ModelFileError("a piece is there twice; the file is corrupt", path=path)
    return SentencePieceModel(pieces, np.array(scores, np.float32), np.array(types, np.int32), has_prefix)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: numbers as int, everything with a length or a fixed size as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field runs past the end")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number of more than 64 bits")
