"""Grammars over one vocabulary: what a grammar allows next, as a bitmask, and how it moves with each token.

The vocabulary is read at the first structured request, not before: a server that never gets one never loads it.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pagoda.base.errors import InvalidRequest
from pagoda.base.log import get_logger

__all__ = ["AllOf", "GrammarCompiler", "Matcher", "Vocabulary"]

logger = get_logger("structured")

_SEVERAL = '{"all"'
_LIMITS: dict[str, Any] = {  # per grammar: a hostile one ends in an error within milliseconds, see llguidance's LLParserLimits
    "step_lexer_fuel": 500_000,
    "step_max_items": 50_000,
    "verbose_errors": False,
}


class Vocabulary(Protocol):
    """The part of `text.tokenizer.Tokenizer` that is needed here."""

    vocab_size: int
    special_ids: frozenset[int]
    bos_id: int | None

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...


class Matcher:
    """One sequence inside a grammar. Not thread-safe; `mask` and `accept` must not overlap."""

    def __init__(self, inner: Any, num_mask_bytes: int, num_token_bytes: int) -> None:
        """Masks of `num_mask_bytes` leave; llguidance writes `num_token_bytes`, a bit for each token it knows: more, where logits are fewer."""
        self._inner, self.num_mask_bytes, self._num_token_bytes = inner, num_mask_bytes, num_token_bytes
        self._bits = bytearray(num_token_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._bits))

    def mask(self) -> bytes:
        """Bit v of the little-endian words allows token v: (ceil(vocab / 32)) uint32. End tokens only where the grammar may end.

        Never raises: after an error no token is allowed, or only an end token, and `accept` says what went wrong. So one grammar's
        trouble does not become that of the step.
        """
        try:
            self._inner.unsafe_compute_mask_ptr(self._address, self._num_token_bytes)
        except Exception as error:
            logger.error("a grammar's mask failed: %s", error)
            return bytes(self.num_mask_bytes)
        return bytes(self._bits)[: self.num_mask_bytes]

    def accept(self, token_id: int) -> str | None:
        """Moves on by one token. The error where the grammar does not allow it, or has become too complex."""
        if self._inner.consume_token(token_id):
            return None
        return _brief(self._inner.get_error())

    def forced(self) -> list[int]:
        """Tokens that must come next, as the tokenizer would write them; empty where there is a choice."""
        found: list[int] = self._inner.compute_ff_tokens()
        return found

    def copy(self) -> Matcher:
        """The same place in the same grammar, to go on independently."""
        return Matcher(self._inner.deep_copy(), self.num_mask_bytes, self._num_token_bytes)


class AllOf:
    """Several grammars that one sequence must fit at once. Where they leave no token the first one decides, and the others are over."""

    def __init__(self, parts: list[Matcher]) -> None:
        self._parts = parts

    def mask(self) -> bytes:
        first, *others = (int.from_bytes(part.mask(), "little") for part in self._parts)
        joint = first
        for other in others:
            joint &= other
        return (joint or first).to_bytes(self._parts[0].num_mask_bytes, "little")

    def accept(self, token_id: int) -> str | None:
        first, *others = self._parts
        self._parts = [first, *(part for part in others if part.accept(token_id) is None)]
        return first.accept(token_id)

    def forced(self) -> list[int]:
        """None: what one grammar forces another may forbid."""
        return []

    def copy(self) -> AllOf:
        return AllOf([part.copy() for part in self._parts])


class GrammarCompiler:
    """Grammar texts -> matchers. Thread-safe. `load` gives the vocabulary; `num_logits` is the width of the model's logits."""

    def __init__(self, load: Callable[[], Vocabulary], num_logits: int) -> None:
        self._load, self._num_logits = load, num_logits
        self._lock = threading.Lock()
        self._tokenizers: dict[tuple[int, ...], Any] = {}

    def compile(self, grammar: str, eos_token_ids: Sequence[int]) -> Matcher | AllOf:
        """`grammar` is one text, or several that `translate.both` joined. Raises InvalidRequest where the grammar is wrong or too large, or the model has no end token."""
        parts = json.loads(grammar).get("all") if grammar.startswith(_SEVERAL) else None
        if parts is not None:
            return AllOf([self._compile_one(part, eos_token_ids) for part in parts])
        return self._compile_one(grammar, eos_token_ids)

    def _compile_one(self, grammar: str, eos_token_ids: Sequence[int]) -> Matcher:
        from llguidance import LLMatcher, LLParserLimits  # 40 ms, at the first request that wants it

        tokenizer = self._tokenizer(tuple(eos_token_ids))
        inner = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        if inner.is_error():
            raise InvalidRequest(f"the grammar cannot be used: {_brief(inner.get_error())}", param="structured_outputs")
        return Matcher(inner, (self._num_logits + 31) // 32 * 4, (tokenizer.vocab_size + 31) // 32 * 4)

    def _tokenizer(self, eos_token_ids: tuple[int, ...]) -> Any:
        if not eos_token_ids:
            raise InvalidRequest("structured output needs a model with an end token", param="structured_outputs")
        with self._lock:
            found = self._tokenizers.get(eos_token_ids)
            if found is None:
                found = self._tokenizers[eos_token_ids] = _build(self._load(), eos_token_ids, self._num_logits)
            return found


def _brief(message: str) -> str:
    return " ".join(message.split("<state>")[0].split())[:300]


def _build(vocabulary: Vocabulary, eos_token_ids: tuple[int, ...], num_logits: int) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    size = max(num_logits, vocabulary.vocab_size)
    return LLTokenizer(TokenizerWrapper(_Words(vocabulary, eos_token_ids, size)), n_vocab=size, eos_token=list(eos_token_ids))


class _Words:
    """The vocabulary as llguidance asks for it."""

    def __init__(self, vocabulary: Vocabulary, eos_token_ids: tuple[int, ...], size: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_token_ids[0], vocabulary.bos_id
        known = vocabulary.vocab_size
        self.tokens = [vocabulary.token_bytes(i) if i < known else b"" for i in range(size)]
        self.special_token_ids = sorted({*vocabulary.special_ids, *eos_token_ids})
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"), add_special_tokens=False)
