"""Blocks of the key/value cache: which are in use, and what the full ones hold (PagedAttention, arXiv:2309.06180)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class BlockAllocator:
    """Hands out blocks, contiguous ones where possible, and finds blocks by the hash of their content.

    A block without users keeps its content, and can be found, until it is handed out again. Blocks are handed out
    going round, so the content that was allocated first is overwritten first. Block 0 is never handed out: the padding
    of a row is written there.
    """

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` includes block 0."""
        if num_blocks < 2:
            raise ValueError(f"a cache of {num_blocks} blocks: at least 2 are needed, because block 0 holds padding.")
        self._users = np.zeros(num_blocks, np.int64)
        self._users[0] = 1
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._next = 1

    @property
    def total(self) -> int:
        """Blocks that can be handed out."""
        return len(self._users) - 1

    @property
    def free(self) -> int:
        """Blocks without users."""
        return int((self._users == 0).sum())

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one user each, as one contiguous range if there is one; None if too few are free."""
        if not count:
            return []
        free = np.flatnonzero(self._users == 0)
        if len(free) < count:
            return None
        free = np.roll(free, -int(np.searchsorted(free, self._next)))
        # A window of `count` free blocks is contiguous where its last number is its first plus count - 1.
        windows = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
        # After rolling, a window across the wrap has a negative difference, so it is never taken for a contiguous one.
        start = int(windows[0]) if len(windows) else 0
        blocks = [int(block) for block in free[start : start + count]]
        for block in blocks:
            self._forget(block)
            self._users[block] = 1
        self._next = (blocks[-1] + 1) % len(self._users)
        return blocks

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known prefix of `hashes`; each of them gets one more user."""
        blocks = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            self._users[block] += 1
            blocks.append(block)
        return blocks

    def register(self, block: int, content: bytes) -> None:
        """Make a full block known under the hash of its content, unless another block is."""
        if content not in self._block_of:
            self._forget(block)
            self._block_of[content] = block
            self._hash_of[block] = content

    def release(self, blocks: Sequence[int]) -> None:
        """Take one user from each block."""
        for block in blocks:
            assert self._users[block] > 0
            self._users[block] -= 1

    def _forget(self, block: int) -> None:
        content = self._hash_of.pop(block, None)
        if content is not None:
            del self._block_of[content]


def block_hash(parent: bytes, token_ids: Sequence[int], images: Sequence[tuple[bytes, int]] = ()) -> bytes:
    """Hash of a block and of all tokens before it.

    Args:
        parent: hash of the block before it; empty for the first.
        token_ids: of the block.
        images: (digest, first image token inside the block) of each image that the block has tokens of. Image tokens
            all have the same id.
    """
    content = hashlib.blake2b(parent, digest_size=16)
    content.update(np.asarray(token_ids, np.int64).tobytes())
    for digest, start in images:
        content.update(digest + start.to_bytes(8, "little", signed=True))
    return content.digest()
