"""Things given back while a step that may still use them is in flight: held until that step has settled.

Both KV blocks and table slots pass through a fence, for the same reason: the worker may be reading them right now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

__all__ = ["Fence"]

T = TypeVar("T", bound=Hashable)


class Fence(Generic[T]):
    """Steps settle in the order they were launched."""

    def __init__(self) -> None:
        self._steps: deque[int] = deque()
        self._held: dict[T, int] = {}  # item -> the last step launched before it was given back

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, item: object) -> bool:
        return item in self._held

    def __iter__(self) -> Iterator[T]:
        return iter(self._held)

    @property
    def is_open(self) -> bool:
        """Nothing is in flight: what is given back may be used again at once."""
        return not self._steps

    def launch(self, step: int) -> None:
        self._steps.append(step)

    def hold(self, item: T) -> None:
        """Keeps `item` until every step now in flight has settled. Only while the fence is closed."""
        self._held[item] = self._steps[-1]

    def discard(self, item: T) -> None:
        """`item` found a new owner without being written to."""
        del self._held[item]

    def settle(self, step: int) -> list[T]:
        """Ends `step`, the oldest in flight; returns what nothing in flight can use any more, in the order it came."""
        assert self._steps and self._steps[0] == step, f"step {step} settles out of order"
        self._steps.popleft()
        if not self._held:
            return []
        freed = [item for item, last in self._held.items() if last <= step]
        for item in freed:
            del self._held[item]
        return freed
