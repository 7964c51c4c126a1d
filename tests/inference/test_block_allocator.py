"""Blocks are handed out once, found by content, and never lost."""

from __future__ import annotations

import random

from megatron_vlm.inference.block_allocator import BlockAllocator, block_hash


def test_blocks_are_contiguous_where_possible_and_block_0_is_never_handed_out() -> None:
    allocator = BlockAllocator(11)
    first, second = allocator.allocate(4), allocator.allocate(3)
    assert (first, second) == ([1, 2, 3, 4], [5, 6, 7])
    allocator.release(first)
    assert allocator.allocate(4) == [1, 2, 3, 4]  # 8, 9, 10 are next but too few
    allocator.release(second[:1])
    assert sorted(allocator.allocate(4) or []) == [5, 8, 9, 10]
    assert allocator.free == 0
    assert allocator.allocate(1) is None


def test_content_is_found_until_its_block_is_handed_out_again() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    assert blocks is not None
    allocator.register(blocks[0], b"a")
    allocator.register(blocks[1], b"b")
    allocator.release(blocks)
    assert allocator.free == 3
    assert allocator.find([b"a", b"x", b"b"]) == blocks[:1]
    assert allocator.free == 2
    assert allocator.allocate(2) is not None  # overwrites "b", not "a", which has a user
    assert allocator.find([b"b"]) == []
    assert allocator.find([b"a", b"b"]) == blocks[:1]


def test_no_block_is_lost_or_used_twice_in_random_use() -> None:
    allocator, chance = BlockAllocator(40), random.Random(0)
    held: list[list[int]] = []
    for number in range(2000):
        if held and chance.random() < 0.5:
            allocator.release(held.pop(chance.randrange(len(held))))
            continue
        shared = allocator.find([b"%d" % chance.randrange(8)])
        count = chance.randrange(1, 6)
        own = allocator.allocate(count)
        if own is None:
            assert allocator.free < count
            allocator.release(shared)
            continue
        allocator.register(own[0], b"%d" % (number % 8))
        assert not set(own) & {block for blocks in held for block in blocks}
        held.append(shared + own)
        assert allocator.free == allocator.total - len({block for blocks in held for block in blocks})
    for blocks in held:
        allocator.release(blocks)
    assert allocator.free == allocator.total == 39


def test_a_hash_depends_on_all_tokens_before_and_on_images() -> None:
    same = block_hash(b"", [1, 2])
    assert same == block_hash(b"", [1, 2])
    different = {same, block_hash(b"", [2, 1]), block_hash(same, [1, 2])}
    different |= {block_hash(b"", [1, 2], [(b"image", start)]) for start in (-1, 0, 1)}
    different.add(block_hash(b"", [1, 2], [(b"other", 0)]))
    assert len(different) == 7
