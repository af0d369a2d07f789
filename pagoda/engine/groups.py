"""What a kind of attention needs of the KV cache: how many blocks, how long, and which prefixes it can serve.

Each group of layers keeps its own block table per request, over one common pool. A full group needs every block of the
sequence; a window group only those a coming query may still see:

    window 5, block size 4, next query at position 11 sees 7..11

    blocks     0        1        2
    positions  0 1 2 3  4 5 6 7  8 9 10 11
               (null)         ^^^^^^^^^^^^
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pagoda.base.types import KvGroup

__all__ = ["FullGroup", "Group", "WindowGroup", "make_groups"]

IsCached = Callable[[int], bool]
"""Whether the block at that place of the sequence is in the prefix index of this group."""


class Group(Protocol):
    """All counts are blocks from the start of the sequence; `num_computed` and `num_total` are tokens."""

    is_full: bool

    def num_passed(self, num_computed: int) -> int:
        """Leading blocks that no query at or after position `num_computed` sees."""

    def num_wanted(self, num_computed: int, num_total: int) -> int:
        """Length of the block table while [num_computed, num_total) is being computed, passed blocks included."""

    def num_live_max(self, num_total: int) -> int:
        """Most blocks owned at one time by a request of that many tokens."""

    def longest_hit(self, is_cached: IsCached, num_blocks_max: int) -> int:
        """Longest prefix, at most `num_blocks_max` blocks, after which computing may start."""


class FullGroup:
    is_full = True

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def num_passed(self, num_computed: int) -> int:
        return 0

    def num_wanted(self, num_computed: int, num_total: int) -> int:
        return -(-num_total // self._block_size)

    def num_live_max(self, num_total: int) -> int:
        return -(-num_total // self._block_size)

    def longest_hit(self, is_cached: IsCached, num_blocks_max: int) -> int:
        for block in range(num_blocks_max):
            if not is_cached(block):
                return block
        return num_blocks_max


class WindowGroup:
    """A long prompt takes only the blocks of one window and one step's tokens at a time."""

    is_full = False

    def __init__(self, kind: KvGroup, block_size: int, max_tokens_per_step: int) -> None:
        assert kind.window >= 1
        self._block_size = block_size
        self._window = kind.window
        self._num_live = kind.max_live_blocks(2**62, block_size=block_size, max_tokens_per_step=max_tokens_per_step)

    def num_passed(self, num_computed: int) -> int:
        unseen = num_computed - self._window + 1
        return unseen // self._block_size if unseen > 0 else 0

    def num_wanted(self, num_computed: int, num_total: int) -> int:
        return min(-(-num_total // self._block_size), self.num_passed(num_computed) + self._num_live)

    def num_live_max(self, num_total: int) -> int:
        return min(-(-num_total // self._block_size), self._num_live)

    def longest_hit(self, is_cached: IsCached, num_blocks_max: int) -> int:
        length, block = num_blocks_max, num_blocks_max - 1
        while length > 0:
            # blocks [block + 1, length) are known to be cached
            if block < self.num_passed(length * self._block_size):
                return length
            if not is_cached(block):
                length = block
            block -= 1
        return 0


def make_groups(kinds: tuple[KvGroup, ...], block_size: int, max_tokens_per_step: int) -> list[Group]:
    return [
        FullGroup(block_size) if kind.kind == "full" else WindowGroup(kind, block_size, max_tokens_per_step)
        for kind in kinds
    ]
