"""The pool of KV blocks: who owns each one, and which verified content can be found again.

A block id names one block in every plane of the KV store, so one pool serves all KV groups. Block 0 is the null block: it
stands for what a window no longer sees, and is never owned, written or read.

    FREE --take--> OWNED --commit--> CACHED+OWNED --release (last owner)--> CACHED --take (evicts the oldest)--> OWNED
      ^              |                    ^                                    |
      +---release----+                    +---------------touch----------------+

    release while steps are in flight: FENCED, then `settle` moves the block on to FREE or CACHED; `touch` may fetch it back.

Invariants (`check_integrity` tests every one):
 1. Each block but 0 is in exactly one place: the free stack, the LRU list, the fence, or owned (reference count > 0).
 2. The reference count of a block is the number of times it stands in the tables of live requests.
 3. A hash is in the index of a group if and only if exactly one block carries it for that group, and both agree.
 4. Blocks on the free stack carry no hash; blocks of the LRU list carry one.
 5. Only full blocks of verified tokens carry a hash, so whatever the index finds can be read at once.
 6. With `keep_unowned` false (prefix caching off) nothing stays in the LRU list: a hash lives as long as its owners.

The LRU list is in order of release, and a request releases its blocks tail first: of one sequence the deepest block is
evicted first, so that what remains is always a usable prefix.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from pagoda.base.hashing import BlockHash
from pagoda.engine.fence import Fence

__all__ = ["NULL_BLOCK", "BlockPool"]

NULL_BLOCK = 0


class BlockPool:
    """Every operation is O(1) per block."""

    def __init__(self, num_blocks: int, num_groups: int, *, keep_unowned: bool) -> None:
        assert num_blocks >= 1, "the pool needs at least the null block"
        self.num_blocks = num_blocks
        self._keep_unowned = keep_unowned
        self._free = list(range(num_blocks - 1, 0, -1))  # a stack: low ids first
        self._lru: OrderedDict[int, None] = OrderedDict()
        self._fence: Fence[int] = Fence()
        self._num_refs = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._groups = [0] * num_blocks  # the group whose index holds the block's hash
        self._index: list[dict[BlockHash, int]] = [{} for _ in range(num_groups)]

    @property
    def num_free(self) -> int:
        """Blocks that `take` can give, cached ones included."""
        return len(self._free) + len(self._lru)

    @property
    def num_fenced(self) -> int:
        return len(self._fence)

    @property
    def usage(self) -> float:
        """Share of the blocks that cannot be taken, 0 to 1."""
        usable = self.num_blocks - 1
        return 1.0 - self.num_free / usable if usable else 0.0

    def find(self, group: int, block_hash: BlockHash) -> int | None:
        """The block holding that content for the group, or None. It stays where it is until `touch`."""
        return self._index[group].get(block_hash)

    def is_owned(self, block: int) -> bool:
        return self._num_refs[block] > 0

    def is_fenced(self, block: int) -> bool:
        return block in self._fence

    def take(self, count: int) -> list[int]:
        """`count` blocks owned once by the caller. The caller has checked `num_free`."""
        assert count <= self.num_free, f"{count} blocks taken, {self.num_free} free"
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._num_refs[block] = 1
            taken.append(block)
        return taken

    def _evict(self) -> int:
        block, _ = self._lru.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._index[self._groups[block]][block_hash]
        self._hashes[block] = None

    def touch(self, blocks: Iterable[int]) -> None:
        """One more owner for each block, which `find` has just named."""
        for block in blocks:
            if self._num_refs[block] == 0:
                if block in self._fence:
                    self._fence.discard(block)
                else:
                    del self._lru[block]
            self._num_refs[block] += 1

    def commit(self, group: int, block_hash: BlockHash, block: int) -> None:
        """Makes the full, verified content of an owned block findable. If another block already holds it, nothing changes."""
        assert self._num_refs[block] > 0 and self._hashes[block] is None
        index = self._index[group]
        if block_hash not in index:
            index[block_hash] = block
            self._hashes[block] = block_hash
            self._groups[block] = group

    def release(self, blocks: Iterable[int]) -> None:
        """One owner less for each block, in the order given; null blocks are passed over."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            assert self._num_refs[block] > 0, f"block {block} released twice"
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0:
                if self._fence.is_open:
                    self._give_back(block)
                else:
                    self._fence.hold(block)

    def _give_back(self, block: int) -> None:
        if self._hashes[block] is not None:
            if self._keep_unowned:
                self._lru[block] = None
                return
            self._forget(block)
        self._free.append(block)

    def launch(self, step: int) -> None:
        """From now on released blocks wait for `settle(step)`."""
        self._fence.launch(step)

    def settle(self, step: int) -> None:
        for block in self._fence.settle(step):
            self._give_back(block)

    def reset(self) -> bool:
        """Forgets all cached content. False, and nothing changed, while any block is owned or fenced."""
        if self.num_free != self.num_blocks - 1:
            return False
        while self._lru:
            self._free.append(self._evict())
        return True

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Tests the invariants against the block tables of all live requests. AssertionError names what is broken."""
        owners = Counter(block for table in tables for block in table if block != NULL_BLOCK)
        places = Counter([*self._free, *self._lru, *self._fence, *owners.keys()])
        assert places == Counter(range(1, self.num_blocks)), "a block is lost or in two places"
        for block in range(self.num_blocks):
            assert self._num_refs[block] == owners.get(block, 0), f"block {block}: wrong reference count"
        hashed = [block for block in range(self.num_blocks) if self._hashes[block] is not None]
        assert sum(map(len, self._index)) == len(hashed), "index and blocks disagree"
        for group, index in enumerate(self._index):
            for block_hash, block in index.items():
                assert self._hashes[block] == block_hash and self._groups[block] == group, f"block {block}: wrong hash"
        assert all(self._hashes[block] is None for block in self._free), "a free block carries a hash"
        assert all(self._hashes[block] is not None for block in self._lru), "a cached block carries no hash"
        assert self._keep_unowned or not self._lru, "unowned blocks kept with prefix caching off"
        assert self._hashes[NULL_BLOCK] is None and self._num_refs[NULL_BLOCK] == 0
