"""Every family gives transformers' logits on a tiny random checkpoint: through the references, through the native kernels
op by op, and recorded, whole and cut into chunks, beyond the window where there is one."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.kernels import table
from tests.models import tiny
from tests.models.harness import load, make_runner, score

pytest.importorskip("torch", reason="torch is the reference of model parity; `make setup` installs it")
pytest.importorskip("transformers", reason="transformers is the reference of model parity; `make setup` installs it")

LENGTH = 77  # several blocks, and beyond every window
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=sorted(tiny.FAMILIES))
def checkpoint(request, tmp_path_factory):  # type: ignore[no-untyped-def]
    path, model = tiny.make(request.param, tmp_path_factory.mktemp("tiny"))
    ids = np.random.default_rng(1).integers(3, tiny.SHAPE["vocab_size"], LENGTH).tolist()
    return path, ids, tiny.reference_logprobs(model, ids)


def test_reference_kernels(checkpoint) -> None:  # type: ignore[no-untyped-def]
    path, ids, expected = checkpoint
    with table.backend("reference"):
        model, facts = load(path)
        got = score(make_runner(model, facts, eager=True, native=False), facts, ids, [LENGTH])
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


@pytest.mark.parametrize("eager", [True, False], ids=["op-by-op", "recorded"])
def test_native_kernels(checkpoint, eager) -> None:  # type: ignore[no-untyped-def]
    path, ids, expected = checkpoint
    model, facts = load(path)
    runner = make_runner(model, facts, eager=eager)
    assert runner.mode[0] == ("op by op" if eager else "recorded")
    whole = score(runner, facts, ids, [LENGTH])
    np.testing.assert_allclose(whole, expected, atol=TOLERANCE)
    chunked = score(runner, facts, ids, [17, 33, 1, 5, 21])
    np.testing.assert_array_equal(chunked, whole)


def test_recorded_equals_op_by_op_bit_for_bit(checkpoint) -> None:  # type: ignore[no-untyped-def]
    path, ids, _ = checkpoint
    model, facts = load(path, dtype="bfloat16")
    found = [score(make_runner(model, facts, eager=eager, kv_dtype="bfloat16"), facts, ids, [LENGTH]) for eager in (True, False)]
    np.testing.assert_array_equal(found[0], found[1])
