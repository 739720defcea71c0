import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import page_format

from selfindex.store.pool import BlockPool
from selfindex.store.table import BlockTable

FORMAT = page_format()


@pytest.fixture
def table():
    """Row 0: pages of 16, 16, 7 tokens; row 1: one page of 16."""
    pool = BlockPool(FORMAT, torch.device("cpu"))
    table = BlockTable(2, pool)
    for row, counts in ((0, [16, 16, 7]), (1, [16])):
        planes = [
            torch.zeros(len(counts), n, dtype=torch.uint8) for n in (FORMAT.index_bytes, FORMAT.payload_bytes)
        ]
        table.append(row, pool.add(*planes), counts)
    return table


def test_tensors_mirror_the_rows(table):
    blocks, counts = table.tensors()
    assert blocks.dtype == counts.dtype == torch.int32
    assert counts.tolist() == [[16, 16, 7], [16, 0, 0]]
    assert blocks[0].tolist() == table.rows[0].blocks
    assert blocks[1, 0].item() == table.rows[1].blocks[0]
    assert [row.tokens for row in table.rows] == [39, 16]


@pytest.mark.parametrize(
    ("keep", "counts"),
    [
        (39, [16, 16, 7]),
        (50, [16, 16, 7]),
        (36, [16, 16, 4]),
        (32, [16, 16]),
        (31, [16, 15]),
        (16, [16]),
        (1, [1]),
        (0, []),
    ],
)
def test_crop_keeps_whole_pages_and_a_part_of_one(table, keep, counts):
    table.tensors()
    used = table.pool.used
    table.crop(0, keep)
    assert table.rows[0].counts == counts
    assert len(table.rows[0].blocks) == len(counts)
    assert table.pool.used == used - (3 - len(counts))
    # The mirror follows, and the other row is untouched.
    assert table.tensors()[1][0].tolist() == counts + [0] * (max(1, len(counts)) - len(counts))
    assert table.rows[1].counts == [16]


@given(appended=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3), st.booleans()), max_size=12))
def test_tensors_follow_appended_pages(appended):
    table = BlockTable(2, BlockPool(FORMAT, torch.device("cpu")))
    block = 0
    for row, pages, look in appended:
        table.append(row, list(range(block, block + pages)), [16] * pages)
        block += pages
        if look:
            table.tensors()
    for mirror, lists in zip(
        table.tensors(), zip(*((r.blocks, r.counts) for r in table.rows), strict=True), strict=True
    ):
        assert mirror.tolist() == [x + [0] * (table.pages - len(x)) for x in lists]
    table.rows = []  # its blocks never were the pool's


def test_select_shares_blocks(table):
    blocks = [list(row.blocks) for row in table.rows]
    table.select([0, 0, 1])
    assert [row.blocks for row in table.rows] == [blocks[0], blocks[0], blocks[1]]
    assert table.pool.used == 4
    table.crop(0, 0)
    assert table.pool.used == 4
    table.crop(1, 0)
    assert table.pool.used == 1


def test_select_lets_go_of_rows_nobody_wants(table):
    table.select([1, 1])
    assert table.pool.used == 1
    assert table.tensors()[0].shape == (2, 1)


def test_copies_of_a_row_are_independent(table):
    table.select([0, 0])
    table.crop(0, 20)
    assert [row.counts for row in table.rows] == [[16, 4], [16, 16, 7]]


def test_no_pages_at_all():
    table = BlockTable(3, BlockPool(FORMAT, torch.device("cpu")))
    assert [t.shape for t in table.tensors()] == [(3, 0), (3, 0)]


def test_the_mirror_stays_in_its_place_while_rows_fit(table):
    """A captured CUDA graph reads it."""
    place = [plane.data_ptr() for plane in table.padded()]
    pages = [torch.zeros(1, n, dtype=torch.uint8) for n in (FORMAT.index_bytes, FORMAT.payload_bytes)]

    def check():
        assert [plane.data_ptr() for plane in table.padded()] == place
        for row, blocks, counts in zip(table.rows, *table.tensors(), strict=True):
            assert blocks.tolist()[: len(row.blocks)] == row.blocks
            assert counts.tolist() == row.counts + [0] * (table.pages - len(row.counts))
        assert not table.padded()[1][:, table.pages :].any()

    for rows in ([1, 0], [0, 0], [1, 1]):
        table.select(rows)
        check()
        table.append(0, table.pool.add(*pages), [16])
        check()
        table.crop(1, 5)
        check()
