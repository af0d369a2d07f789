"""Stop strings against the definition, written as a loop over characters, for every way to cut the stream."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pagoda.text.stop import StopChecker


def by_definition(text: str, stops: list[str], num_immune: int, include: bool) -> tuple[str, str | None]:
    """The first character behind the immune ones that completes a stop string; the longest one there counts."""
    for end in range(num_immune + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], num_immune: int, stops: list[str], include: bool) -> tuple[str, str | None]:
    checker = StopChecker(stops, include_stop_str_in_output=include)
    shown: list[str] = []
    for index, piece in enumerate(pieces):
        found = checker.feed(piece, may_stop=index >= num_immune)
        shown.append(found.text)
        if found.stop is not None:
            return "".join(shown), found.stop
    return "".join(shown) + checker.flush(), None


ALPHABET = "ab\n"
strings = st.text(ALPHABET, min_size=1, max_size=4)


@settings(max_examples=600, deadline=None)
@given(
    pieces=st.lists(st.text(ALPHABET, max_size=4), max_size=12),
    stops=st.lists(strings, min_size=1, max_size=4),
    num_immune=st.integers(0, 4),
    include=st.booleans(),
)
def test_any_cut_is_the_definition(pieces: list[str], stops: list[str], num_immune: int, include: bool) -> None:
    text, stop = run(pieces, num_immune, stops, include)
    immune = len("".join(pieces[:num_immune]))
    assert (text, stop) == by_definition("".join(pieces), stops, immune, include)


@settings(max_examples=300, deadline=None)
@given(text=st.text(ALPHABET, max_size=30), stops=st.lists(strings, min_size=1, max_size=4))
def test_no_beginning_of_a_stop_string_is_handed_out(text: str, stops: list[str]) -> None:
    """Whatever end of the stream may still become a stop string has not been shown."""
    checker = StopChecker(stops)
    shown = ""
    for end in range(1, len(text) + 1):
        found = checker.feed(text[end - 1])
        shown += found.text
        assert text.startswith(shown)
        if found.stop is not None:
            assert len(shown) == end - len(found.stop)
            return
        live = max((n for stop in stops for n in range(len(stop)) if text[:end].endswith(stop[:n])), default=0)
        assert len(shown) == end - live


def test_longest_of_those_complete_at_once() -> None:
    assert run(["xa", "b"], 0, ["b", "ab"], False) == ("x", "ab")
    assert run(["xabc"], 0, ["abc", "b"], False) == ("xa", "b")


def test_immune_text_counts_as_a_beginning() -> None:
    assert run(["ab", "c"], 1, ["b", "bc"], False) == ("a", "bc")
    assert run(["ab", "c"], 1, ["b"], False) == ("abc", None)
