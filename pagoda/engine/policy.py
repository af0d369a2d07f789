"""Who goes first. A policy is one function from a request to a sort key; smaller runs sooner, larger is preempted sooner."""

from __future__ import annotations

from collections.abc import Callable

from pagoda.base.registry import Registry
from pagoda.engine.request import Request

__all__ = ["POLICIES", "Policy", "fcfs", "priority"]

Policy = Callable[[Request], tuple[int, ...]]
"""Keys of two requests are never equal: the order of arrival is their last component."""

POLICIES: Registry[Policy] = Registry("scheduling policy")


def fcfs(req: Request) -> tuple[int, ...]:
    """First come, first served."""
    return (req.sequence,)


def priority(req: Request) -> tuple[int, ...]:
    """Lower `priority` first; among equals first come, first served."""
    return (req.priority, req.sequence)


POLICIES.add("fcfs", fcfs)
POLICIES.add("priority", priority)
