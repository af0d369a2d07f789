"""`banned_strings` as a grammar: every text in which none of them stands, however it is cut into tokens.

Nothing has to be taken back: a token that would complete a banned string is never drawn. Letters count as they are written.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["banned_grammar"]


def banned_grammar(strings: Sequence[str]) -> str:
    """A Lark grammar for llguidance; `strings` are not empty."""
    escaped = "|".join(_escaped(text) for text in dict.fromkeys(strings))
    return f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*)({escaped})(?s:.*)/"


def _escaped(text: str) -> str:
    """A regular expression of exactly `text`. ASCII but letters and digits by code: nothing has a meaning, and a rule stays one line."""
    return "".join(c if c.isalnum() or not c.isascii() else f"\\x{ord(c):02x}" for c in text)
