"""A `tokenizers.Tokenizer` from the metadata of a GGUF file.

`tokenizer.ggml.model` names the kind:

    gpt2    byte-level BPE: the text is split by the expressions of `tokenizer.ggml.pre`, bytes are renamed to
            printable characters, merges are applied in the order of the file
    gemma4  BPE on raw text with spaces as U+2581 and `<0xXX>` tokens for what is not in the vocabulary
    llama   sentencepiece BPE: the file has scores instead of merges, see `text/sentencepiece.py`
    bert    WordPiece; the file marks the start of a word by U+2581 where the original marks continuations by `##`

Control, user-defined and unknown tokens (`tokenizer.ggml.token_type`) become added tokens, matched before all else.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from pagoda.base.errors import ModelFileError
from pagoda.files.gguf import GgufMetadata
from pagoda.text.pre_tokenizers import PreTokenizer, find_pre_tokenizer
from pagoda.text.sentencepiece import SPACE, TokenType, add_tokens, build_bpe, build_sentencepiece, spaced_decoder

__all__ = ["GgufVocabulary", "build_gguf_tokenizer"]

_PREFIX = "tokenizer.ggml."
_ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelled so in the format
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
    "fim_prefix": "fim_pre_token_id",
    "fim_suffix": "fim_suf_token_id",
    "fim_middle": "fim_mid_token_id",
}
_TURN_ENDS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<turn|>",
        "[e~[",
        "<｜end▁of▁sentence｜>",
    ]
)


class GgufVocabulary(NamedTuple):
    """`special_ids` maps a role (bos, eos, pad, ...) to a token; `eos_ids` are all tokens that end an answer."""

    backend: tokenizers.Tokenizer
    special_ids: dict[str, int]
    eos_ids: tuple[int, ...]


class _Parts(NamedTuple):
    """What differs between the kinds."""

    backend: tokenizers.Tokenizer
    add_bos: bool
    add_sep: bool


def build_gguf_tokenizer(metadata: GgufMetadata) -> GgufVocabulary:
    """Raises ModelFileError where the vocabulary is absent, inconsistent, or of a kind that is not known."""
    tokens = metadata.get_strings(_PREFIX + "tokens")
    if not tokens:
        raise ModelFileError("the file has no vocabulary (`tokenizer.ggml.tokens`); use --tokenizer to name one")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelFileError(f"{len(tokens) - len(vocab)} tokens of the vocabulary are there twice; the file is corrupt")
    kind = metadata.get_str(_PREFIX + "model") or ""
    if kind not in _BUILDERS:
        raise ModelFileError(f"tokenizer model `{kind}` is not supported; known are {', '.join(_BUILDERS)}")
    ids = _special_ids(metadata, len(tokens), kind)
    parts = _BUILDERS[kind](metadata, vocab, ids)
    types = metadata.get_numbers(_PREFIX + "token_type")
    if types is not None and len(types) != len(tokens):
        raise ModelFileError(f"{len(types)} token types for {len(tokens)} tokens; the file is corrupt")
    if types is not None:
        add_tokens(parts.backend, tokens, types)
    _set_template(parts, metadata, tokens, ids)
    return GgufVocabulary(parts.backend, ids, _eos_ids(tokens, types, ids))


def _special_ids(metadata: GgufMetadata, vocab_size: int, kind: str) -> dict[str, int]:
    """Roles from the file; an id outside the vocabulary is an error."""
    defaults = {"llama": {"bos": 1, "eos": 2, "unk": 0}}.get(kind, {})
    ids = {}
    for role, key in _ID_KEYS.items():
        token_id = metadata.get_int(_PREFIX + key, defaults.get(role))
        if token_id is None:
            continue
        if not 0 <= token_id < vocab_size:
            raise ModelFileError(f"`{_PREFIX}{key}` is {token_id}, outside the vocabulary of {vocab_size}")
        ids[role] = token_id
    return ids


def _merges(metadata: GgufMetadata) -> list[tuple[str, str]]:
    """The file's merges. A token may begin with a space, so the separator is searched from the second character."""
    merges = []
    for line in metadata.get_strings(_PREFIX + "merges"):
        at = line.find(" ", 1)
        if at < 0:
            raise ModelFileError(f"`{line}` in `{_PREFIX}merges` is not a pair; the file is corrupt")
        merges.append((line[:at], line[at + 1 :]))
    return merges


def _build_byte_level(metadata: GgufMetadata, vocab: dict[str, int], ids: dict[str, int]) -> _Parts:
    pre = find_pre_tokenizer(metadata.get_str(_PREFIX + "pre") or "default")
    if pre.raw:
        return _build_raw(metadata, vocab, pre)
    backend = build_bpe(vocab, _merges(metadata), ignore_merges=pre.ignore_merges)
    if metadata.get_bool(_PREFIX + "add_space_prefix", False):
        backend.normalizer = normalizers.Prepend(" ")
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    return _Parts(backend, pre.add_bos, pre.add_sep)


def _build_gemma4(metadata: GgufMetadata, vocab: dict[str, int], ids: dict[str, int]) -> _Parts:
    return _build_raw(metadata, vocab, find_pre_tokenizer("gemma4"))


def _build_raw(metadata: GgufMetadata, vocab: dict[str, int], pre: PreTokenizer) -> _Parts:
    backend = build_bpe(vocab, _merges(metadata), byte_fallback=True, fuse_unk=True)
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre.build()
    backend.decoder = spaced_decoder(strip=False)
    return _Parts(backend, pre.add_bos, pre.add_sep)


def _build_sentencepiece(metadata: GgufMetadata, vocab: dict[str, int], ids: dict[str, int]) -> _Parts:
    scores = metadata.get_numbers(_PREFIX + "scores")
    if scores is None or len(scores) != len(vocab):
        raise ModelFileError("a sentencepiece vocabulary needs one score per token; the file is corrupt")
    has_prefix = metadata.get_bool(_PREFIX + "add_space_prefix", True)
    unk_token = list(vocab)[ids["unk"]]
    return _Parts(build_sentencepiece(vocab, scores, unk_token=unk_token, has_prefix=has_prefix), True, False)


def _build_wordpiece(metadata: GgufMetadata, vocab: dict[str, int], ids: dict[str, int]) -> _Parts:
    pieces = {_as_wordpiece(token): index for token, index in vocab.items()}
    if len(pieces) != len(vocab) or "unk" not in ids:
        raise ModelFileError("the WordPiece vocabulary is inconsistent; the file is corrupt")
    unk = _as_wordpiece(list(vocab)[ids["unk"]])
    backend = tokenizers.Tokenizer(models.WordPiece(pieces, unk_token=unk, max_input_chars_per_word=100))
    lowercase = metadata.get_bool(_PREFIX + "normalizer.lowercase", True)
    strip_accents = metadata.get_bool(_PREFIX + "normalizer.strip_accents", lowercase)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return _Parts(backend, True, True)


def _as_wordpiece(token: str) -> str:
    if token.startswith(SPACE):
        return token[1:]
    return token if token.startswith("[") and token.endswith("]") else "##" + token


_BUILDERS = {
    "gpt2": _build_byte_level,
    "llama": _build_sentencepiece,
    "gemma4": _build_gemma4,
    "bert": _build_wordpiece,
}


def _set_template(parts: _Parts, metadata: GgufMetadata, tokens: list[str], ids: dict[str, int]) -> None:
    """What `add_special_tokens` puts around a text."""
    bos = ids.get("bos", ids.get("cls")) if metadata.get_bool(_PREFIX + "add_bos_token", parts.add_bos) else None
    eos = ids.get("eos") if metadata.get_bool(_PREFIX + "add_eos_token", False) else None
    sep = ids.get("sep") if metadata.get_bool(_PREFIX + "add_sep_token", parts.add_sep) else None
    end = [token_id for token_id in (eos, sep) if token_id is not None]
    names = {f"<{token_id}>": token_id for token_id in [*([] if bos is None else [bos]), *end]}
    if not names:
        return
    single = [*([f"<{bos}>"] if bos is not None else []), "$A", *(f"<{token_id}>" for token_id in end)]
    parts.backend.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B:1"], special_tokens=list(names.items())
    )


def _eos_ids(tokens: list[str], types: np.ndarray | None, ids: dict[str, int]) -> tuple[int, ...]:
    """The file's own end tokens first, then control tokens whose text ends a turn in every model that has them.

    Models with several ways to end (a turn, a message, the text) name only one of them in the file.
    """
    found = [ids[role] for role in ("eos", "eot", "eom") if role in ids]
    control = [] if types is None else np.flatnonzero(types == TokenType.CONTROL).tolist()
    found += [token_id for token_id in control if tokens[token_id] in _TURN_ENDS]
    names = {tokens[token_id] for token_id in found}
    if {"<|return|>", "<|call|>"} <= names:  # there `<|end|>` only ends a message
        found = [token_id for token_id in found if tokens[token_id] != "<|end|>"]
    return tuple(dict.fromkeys(found))
