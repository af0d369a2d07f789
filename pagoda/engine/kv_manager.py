"""KV blocks per request: prefix hits, block tables, windows that slide, and content committed once it is verified.

Every method leaves pool and tables consistent, whether it succeeds or not. A request owns, from admission on, the blocks of
all its known tokens (of a window group: of one window and one step), so a prompt that was admitted never waits half way.

Sharing needs verified content, so of two requests that arrive together the second waits for the first: `mark` notes which
full blocks a step is computing and for whom, and `look_up` answers "await" instead of a shorter hit while the owner of the
next block is running. With prefix caching off the same mechanism serves the n samples of one request: their hash chain
starts at a root nobody else has, and their blocks are forgotten with their last owner.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pagoda.base.hashing import BlockHash
from pagoda.base.types import KvGroup
from pagoda.engine.block_pool import NULL_BLOCK, BlockPool
from pagoda.engine.groups import Group, make_groups
from pagoda.engine.request import Request, RequestState

__all__ = ["KvManager", "PrefixHit"]


class PrefixHit(NamedTuple):
    """What the cache holds of a request. Valid until the next change of the pool."""

    num_blocks: int
    awaited_hash: BlockHash | None = None  # the next block is being computed by another request: try again after the step


class KvManager:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        kinds: tuple[KvGroup, ...],
        *,
        enable_prefix_caching: bool,
        watermark: float,
        max_tokens_per_step: int,
    ) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, len(kinds), keep_unowned=enable_prefix_caching)
        self._enable_prefix_caching = enable_prefix_caching
        self._groups: list[Group] = make_groups(kinds, block_size, max_tokens_per_step)
        self._has_windows = not all(group.is_full for group in self._groups)
        self._num_blocks_spare = int(watermark * num_blocks)
        self._computing: dict[BlockHash, Request] = {}

    def num_blocks_needed(self, num_tokens: int) -> int:
        """Most blocks a request of that length owns at one time."""
        return sum(group.num_live_max(num_tokens) for group in self._groups)

    # ---- admission

    def look_up(self, req: Request) -> PrefixHit:
        """Longest prefix every group can serve, in blocks; always less than the request, which must compute a token."""
        if req.hash_root is None or req.wants_prompt_logprobs:
            return PrefixHit(0)
        if req.awaited_hash is not None and self._is_being_computed(req.awaited_hash):
            return PrefixHit(0, req.awaited_hash)
        num_blocks_max = (len(req.token_ids) - 1) // self.block_size
        num_blocks = self._longest_hit(req, num_blocks_max)
        if num_blocks < num_blocks_max:
            block_hash = req.block_hash(num_blocks, self.block_size)
            if self._is_being_computed(block_hash):
                return PrefixHit(num_blocks, block_hash)
        return PrefixHit(num_blocks)

    def _is_being_computed(self, block_hash: BlockHash) -> bool:
        owner = self._computing.get(block_hash)
        return owner is not None and owner.state is RequestState.RUNNING

    def _longest_hit(self, req: Request, num_blocks: int) -> int:
        """Each group may only shorten the hit; done when none of them does."""
        find, block_size = self.pool.find, self.block_size
        agreed = -1
        while num_blocks != agreed and num_blocks > 0:
            agreed = num_blocks
            for idx, group in enumerate(self._groups):

                def is_cached(block: int, idx: int = idx) -> bool:
                    return find(idx, req.block_hash(block, block_size)) is not None

                num_blocks = group.longest_hit(is_cached, num_blocks)
        return num_blocks

    def admit(self, req: Request, hit: PrefixHit, *, keep_spare: bool) -> bool:
        """Gives a waiting request its hit and the blocks of all its tokens, or False with nothing changed.

        `keep_spare` leaves the watermark's blocks free. On success `num_tokens_computed` is the length of the hit.
        """
        num_computed = hit.num_blocks * self.block_size
        shared = [self._hit_blocks(req, idx, hit.num_blocks) for idx in range(len(self._groups))]
        num_new = [
            group.num_wanted(num_computed, len(req.token_ids)) - hit.num_blocks for group in self._groups
        ]
        num_revived = sum(not self.pool.is_owned(block) for blocks in shared for block in blocks if block != NULL_BLOCK)
        needed = sum(num_new) + num_revived + (self._num_blocks_spare if keep_spare else 0)
        if needed > self.pool.num_free + self._num_fenced_hits(shared):
            return False
        for blocks in shared:
            self.pool.touch(block for block in blocks if block != NULL_BLOCK)
        req.block_tables = [blocks + self.pool.take(count) for blocks, count in zip(shared, num_new, strict=True)]
        req.num_blocks_slid = [group.num_passed(num_computed) for group in self._groups]
        req.num_blocks_committed = hit.num_blocks
        req.num_tokens_computed = num_computed
        return True

    def _hit_blocks(self, req: Request, idx: int, num_blocks: int) -> list[int]:
        num_passed = self._groups[idx].num_passed(num_blocks * self.block_size)
        blocks = [NULL_BLOCK] * num_passed
        for place in range(num_passed, num_blocks):
            block = self.pool.find(idx, req.block_hashes[place])
            assert block is not None
            blocks.append(block)
        return blocks

    def _num_fenced_hits(self, shared: list[list[int]]) -> int:
        """Hits behind the fence are revived without costing a free block."""
        if self.pool.num_fenced == 0:
            return 0
        return sum(self.pool.is_fenced(block) for blocks in shared for block in blocks)

    # ---- growth

    def extend(self, req: Request) -> list[list[int]] | None:
        """Slides the windows of a running request, then gives it the blocks its known tokens need.

        Returns the new block ids per group, [] when none were needed, or None when the pool cannot give them.
        """
        num_computed, num_total, tables = req.num_tokens_computed, len(req.token_ids) + req.num_tokens_ahead, req.block_tables
        if self._has_windows:
            self._slide(req)
        elif not tables or num_total <= len(tables[0]) * self.block_size:
            return []
        num_new = [
            group.num_wanted(num_computed, num_total) - len(table) for group, table in zip(self._groups, tables)
        ]
        needed = sum(count for count in num_new if count > 0)
        if needed == 0:
            return []
        if needed > self.pool.num_free:
            return None
        new_ids = [self.pool.take(count) if count > 0 else [] for count in num_new]
        for table, ids in zip(tables, new_ids):
            table.extend(ids)
        return new_ids

    def _slide(self, req: Request) -> None:
        for idx, group in enumerate(self._groups):
            num_passed, num_slid = group.num_passed(req.num_tokens_computed), req.num_blocks_slid[idx]
            if num_passed > num_slid:
                table = req.block_tables[idx]
                self.pool.release(reversed(table[num_slid:num_passed]))
                table[num_slid:num_passed] = [NULL_BLOCK] * (num_passed - num_slid)
                req.num_blocks_slid[idx] = num_passed

    # ---- content

    def mark(self, req: Request, num_tokens: int) -> list[BlockHash]:
        """Notes the full blocks that computing `num_tokens` more works on; the result goes to `unmark` after the step."""
        if req.hash_root is None:
            return []
        begin = req.num_tokens_computed + req.num_tokens_planned
        first = begin // self.block_size
        if first >= len(req.token_ids) // self.block_size:
            return []  # as when decoding: the block is not full yet
        last = min(-(-(begin + num_tokens) // self.block_size), self._num_blocks_sharable(req))
        if first >= last:
            return []
        hashes = [req.block_hash(block, self.block_size) for block in range(first, last)]
        for block_hash in hashes:
            self._computing[block_hash] = req
        return hashes

    def unmark(self, req: Request, hashes: list[BlockHash]) -> None:
        for block_hash in hashes:
            if self._computing.get(block_hash) is req:
                del self._computing[block_hash]

    def _num_blocks_sharable(self, req: Request) -> int:
        """Full blocks worth a hash: all known tokens, or the prompt where only sibling samples can share."""
        num_tokens = len(req.token_ids) if self._enable_prefix_caching else req.num_prompt_tokens
        return num_tokens // self.block_size

    def commit(self, req: Request) -> None:
        """Offers every full block up to `num_tokens_computed`, whose tokens are now verified, to the prefix index."""
        if req.hash_root is None:
            return
        num_full = req.num_tokens_computed // self.block_size
        if num_full <= req.num_blocks_committed:
            return
        num_full = min(num_full, self._num_blocks_sharable(req))
        for place in range(req.num_blocks_committed, num_full):
            block_hash = req.block_hash(place, self.block_size)
            for idx, table in enumerate(req.block_tables):
                if table[place] != NULL_BLOCK:
                    self.pool.commit(idx, block_hash, table[place])
        req.num_blocks_committed = max(req.num_blocks_committed, num_full)

    # ---- the end

    def release(self, req: Request) -> None:
        """Gives back everything, tail first."""
        for table in req.block_tables:
            self.pool.release(reversed(table))
        req.block_tables, req.num_blocks_slid, req.num_blocks_committed = [], [], 0

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """AssertionError unless pool and tables agree; `requests` are all that are not finished."""
        tables = []
        for req in requests:
            assert (req.state is RequestState.RUNNING) == bool(req.block_tables) or not self._groups
            for idx, table in enumerate(req.block_tables):
                num_slid = req.num_blocks_slid[idx]
                assert all(block == NULL_BLOCK for block in table[:num_slid]), "a slid block is still in the table"
                assert all(block != NULL_BLOCK for block in table[num_slid:]), "a live block is null"
                tables.append(table)
        self.pool.check_integrity(tables)
