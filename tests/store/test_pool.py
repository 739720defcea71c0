import torch
from pages import page_format

from selfindex.store.pool import BlockPool

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
