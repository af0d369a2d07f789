"""Block hashes: a chain over parent, tokens and whatever else decides the content of a block.

sha256, so that a hit needs no comparison of tokens; the chain means that a block's hash names its whole prefix.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import NewType

__all__ = ["BlockHash", "chain_hash", "root_hash"]

BlockHash = NewType("BlockHash", bytes)
"""32 bytes naming the tokens of one full block and everything before it."""


def root_hash(*parts: str) -> BlockHash:
    """The parent of a first block: salt, adapter, anything that separates one user's cache from another's."""
    digest = hashlib.sha256(b"pagoda-kv-1")
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return BlockHash(digest.digest())


def chain_hash(parent: BlockHash, token_ids: Sequence[int], extra: bytes = b"") -> BlockHash:
    """Hash of one full block. `extra` carries content hashes of media that overlap the block."""
    digest = hashlib.sha256(parent)
    digest.update(array("i", token_ids).tobytes())
    digest.update(extra)
    return BlockHash(digest.digest())
