import pytest
import torch
from pages import constants_for, gaussian, page_format

from selfindex.backends import ops
from selfindex.store.pool import BlockPool, Part

FORMAT = page_format()


def make_pool():
    return BlockPool(FORMAT, torch.device("cpu"))


def pages(*fill):
    """Pages whose bytes all have the given value."""
    column = torch.tensor(fill, dtype=torch.uint8)[:, None]
    return column.expand(-1, FORMAT.index_bytes), column.expand(-1, FORMAT.payload_bytes)


def content(pool, blocks):
    rows = [set(pool.index[b].tolist()) | set(pool.payload[b].tolist()) for b in blocks]
    assert all(len(row) == 1 for row in rows)
    return [row.pop() for row in rows]


def test_pages_keep_their_bytes_while_the_pool_grows():
    pool, blocks = make_pool(), []
    for i in range(0, 40, 2):
        blocks += pool.add(*pages(i, i + 1))
    assert len(set(blocks)) == 40
    assert content(pool, blocks) == list(range(40))
    assert pool.used == 40


def test_pages_added_together_to_an_empty_pool_are_one_ascending_run():
    assert make_pool().add(*pages(*range(7))) == list(range(7))


def test_released_blocks_are_used_again_before_the_pool_grows():
    pool = make_pool()
    blocks = pool.add(*pages(*range(10)))
    capacity = pool.capacity
    pool.release(blocks[2:6])
    assert pool.used == 6
    again = pool.add(*pages(100, 101, 102, 103))
    assert set(again) == set(blocks[2:6])
    assert pool.capacity == capacity
    assert content(pool, blocks[:2] + blocks[6:]) == [0, 1, 6, 7, 8, 9]


def test_a_block_is_free_once_its_last_holder_lets_go():
    pool = make_pool()
    (block,) = pool.add(*pages(1))
    pool.retain([block])
    pool.retain([block])
    for _ in range(2):
        pool.release([block])
        assert pool.used == 1
    pool.release([block])
    assert pool.used == 0


def test_growth_copies_each_page_a_bounded_number_of_times():
    pool, copied, moves = make_pool(), 0, 0
    for _ in range(400):
        before, old = pool.index.data_ptr(), pool.capacity
        pool.add(*pages(0))
        if pool.index.data_ptr() != before:
            copied, moves = copied + old, moves + 1
    # Growing by a sixteenth copies every page about 16 times in all; growing by one would be 200.
    assert copied < 24 * 400
    assert moves < 100


def test_slack_stays_small():
    pool = make_pool()
    for used in range(1, 300):
        pool.add(*pages(0))
        assert pool.capacity - used <= used / 16 + 1


def part(counts, seed):
    keys, values = gaussian(2, len(counts), 2, 16, 64, seed=seed)
    return Part(keys, values, counts, constants_for(FORMAT, keys))


def check_encoded(pool, blocks, parts):
    start = 0
    for x in parts:
        counts = torch.tensor(x.counts, dtype=torch.int32)
        planes = ops.encode(x.keys, x.values, counts, x.constants, FORMAT.name)
        own = blocks[start : start + len(counts)]
        assert torch.equal(pool.index[own], planes[0])
        assert torch.equal(pool.payload[own], planes[1])
        start += len(own)
    assert start == len(blocks)


@pytest.mark.parametrize("offloading", [False, True])
def test_encoded_pages_are_counted_once_they_are_added(offloading):
    pool = BlockPool(FORMAT, torch.device("cpu"), offloading)
    held = pool.add(*pages(1, 2, 3))
    parts = [part([16, 16], 1), part([16, 5], 2)]
    pool.encode(parts)  # is not wanted after all
    assert pool.used == 3
    blocks = pool.add_encoded(pool.encode(parts))
    assert (pool.used, len(set(held + blocks))) == (7, 7)
    assert all(pool.references(block) == 1 for block in blocks)
    check_encoded(pool, blocks, parts)
    assert content(pool, held) == [1, 2, 3]


@pytest.mark.parametrize("offloading", [False, True])
def test_pages_of_two_that_were_encoded_side_by_side_are_both_there(offloading):
    # As forks in threads do: each plans, then each stores.
    pool = BlockPool(FORMAT, torch.device("cpu"), offloading)
    parts = [[part([16, 16], 1)], [part([7], 2), part([16], 3)], [part([16], 4)]]
    planned = [pool.encode(x) for x in parts]
    between = pool.add(*pages(9))
    pool.reserve(20)
    added = [pool.add_encoded(x) for x in planned]
    assert len({block for blocks in (*added, between) for block in blocks}) == 6
    for blocks, x in zip(added, parts, strict=True):
        check_encoded(pool, blocks, x)
    assert content(pool, between) == [9]


def test_blocks_that_do_not_follow_each_other_are_encoded_into():
    pool = make_pool()
    blocks = pool.add(*pages(*range(10)))
    pool.release([blocks[i] for i in (7, 2, 5)])
    parts = [part([16, 16, 16], 1)]
    added = pool.add_encoded(pool.encode(parts))
    assert sorted(added) == sorted(blocks[i] for i in (2, 5, 7))
    check_encoded(pool, added, parts)


@pytest.mark.parametrize("grow", [0, 30])
def test_pages_that_become_free_meanwhile_are_not_taken_for_encoded_ones(grow):
    pool = make_pool()
    held = pool.add(*pages(*range(10)))
    pool.reserve(5)
    parts = [part([16, 16, 16], 1)]
    planned = pool.encode(parts)
    pool.release([held[i] for i in (7, 2)])
    assert pool.used == 8
    pool.reserve(grow)
    added = pool.add_encoded(planned)
    assert not set(added) & set(held)
    check_encoded(pool, added, parts)
    assert pool.used == 11
    others = pool.add(*pages(*range(20, 20 + pool.capacity - 11)))
    assert len({*others, *added, *(held[i] for i in (0, 1, 3, 4, 5, 6, 8, 9))}) == pool.capacity
    check_encoded(pool, added, parts)
