"""`usage.completion_tokens_details.reasoning_tokens`: tokens between the marks of reasoning, the marks not counted.

Where the marks are tokens of their own they are counted as they come, so a stream says the same as a whole answer. Where they are not
(text, Harmony's channels) the reasoning's text is counted, once, when the sample has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.serve.context import TokenizerLike
from pagoda.text.message import OutputFormat
from pagoda.text.reasoning.parser import ReasoningFormat

__all__ = ["ReasoningCount", "marks_of"]


def marks_of(reasoning: ReasoningFormat | None, tokenizer: TokenizerLike) -> tuple[list[int], list[int]] | None:
    """Tokens of the start and of the end; None without a format."""
    if reasoning is None:
        return None
    start, end = (tokenizer.encode(marker, add_special_tokens=False) for marker in (reasoning.start, reasoning.end))
    return start, end


class ReasoningCount:
    """Of one sample."""

    def __init__(self, format: OutputFormat, prompt: str, tokenizer: TokenizerLike) -> None:
        self.count = 0
        self._tokenizer = tokenizer
        marks = marks_of(format.reasoning, tokenizer)
        self._marks = (marks[0][0], marks[1][0]) if marks is not None and len(marks[0]) == len(marks[1]) == 1 else None
        self._text: list[str] = []
        assert format.reasoning is None or not format.is_harmony
        is_open = format.reasoning is not None and format.reasoning.is_open(prompt)
        is_over = format.reasoning is not None and format.reasoning.is_over(prompt)
        self._state = "open" if is_open else "over" if is_over else "start"

    def feed(self, token_ids: Sequence[int], reasoning: str | None, *, is_end: bool) -> None:
        """New tokens, and what of their text was reasoning."""
        if self._marks is None:
            if reasoning:
                self._text.append(reasoning)
            if is_end and self._text:
                self.count = len(self._tokenizer.encode("".join(self._text), add_special_tokens=False))
            return
        start, end = self._marks
        for token_id in token_ids:
            if self._state == "over":
                return
            if self._state == "open":
                is_mark = token_id in (start, end)
                self._state = "over" if token_id == end else "open"
                self.count += not is_mark
            elif token_id == start:
                self._state = "open"
            elif self._tokenizer.token_bytes(token_id).strip():
                self._state = "over"
