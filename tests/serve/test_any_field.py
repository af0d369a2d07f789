"""Whatever stands in the fields of a body, it is answered, and never with a 5xx: a small sibling of `test_schemathesis`."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagoda.serve.openai_chat import ChatCompletionRequest
from pagoda.serve.openai_completions import CompletionRequest

NUMBERS = st.one_of(st.integers(-3, 130), st.sampled_from([2**31, -(2**53), 2**63, 1e308]), st.floats(allow_nan=False, allow_infinity=False))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
RIGHT = {
    "/v1/completions": (CompletionRequest, {"prompt": "ab", "max_tokens": 2}),
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2}),
}


@pytest.mark.parametrize("path", list(RIGHT))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_never_a_5xx(http: httpx.Client, path: str, data: st.DataObject) -> None:
    kind, body = RIGHT[path]
    names = data.draw(st.lists(st.sampled_from(kind.__struct_fields__), min_size=1, max_size=2, unique=True))
    sent = body | {name: data.draw(VALUES, label=name) for name in names if name != "timeout"}
    assert http.post(path, json=sent, timeout=30).status_code < 500, sent
