"""A short soak; `python -m tests.serve.soak` is the long one."""

from __future__ import annotations

from tests.serve.soak import run


def test_streams_that_come_and_go_leave_nothing() -> None:
    report = run(streams=60, seconds=3.0)
    assert report.is_good, report
    assert report.grown_mib < 50, report
