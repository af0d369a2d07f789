"""A text passes the grammar of banned strings exactly when none of them stands in it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.structured.banned import banned_grammar
from pagoda.structured.matcher import GrammarCompiler, Matcher
from tests.serve.fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()
COMPILER = GrammarCompiler(lambda: TOKENIZER, 258)
EOS = 257


def matcher(*strings: str) -> Matcher:
    return COMPILER.compile(json.dumps({"grammars": [{"lark_grammar": banned_grammar(strings)}]}), [EOS])


def passes(text: str, *strings: str) -> bool:
    found = matcher(*strings)
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        mask = found.mask()
        if not mask[token // 8] >> token % 8 & 1:
            return False
        assert found.accept(token) is None
    return bool(found.mask()[EOS // 8] >> EOS % 8 & 1)


@settings(max_examples=60, deadline=None)
@given(text=st.text("ab\n", max_size=10), strings=st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1, max_size=3))
def test_exactly_the_texts_without_them_pass(text: str, strings: list[str]) -> None:
    assert passes(text, *strings) == all(string not in text for string in strings)


@pytest.mark.parametrize("string", ["a/b", "\n\nUser:", '"q" x', "[z]{2}", "é€", "\\n", ".", "#!~&<>@%'`,;=_-", "\x7f\t", "日本"])
def test_every_character_means_itself(string: str) -> None:
    assert not passes(f"x{string}y", string)
    assert passes("x nothing of it y" if "." not in string else "xy", string)
    assert passes(string[:-1] + "y", string)
