"""What comes between two steps of the pool: Ctrl-C, the garbage collector, a signal's handler, threads."""

import copy
import gc
import sys
from contextlib import contextmanager

import pytest
import torch
from faults import AtLine, Meanwhile, fault
from pages import page_format
from threads import at_once

from selfindex import StateError
from selfindex.store.pool import BlockPool
from selfindex.store.table import BlockTable

FORMAT = page_format(page=8)


def pages(*fill):
    column = torch.tensor(fill, dtype=torch.uint8)[:, None]
    return column.expand(-1, FORMAT.index_bytes), column.expand(-1, FORMAT.payload_bytes)


def content(table):
    """What the pages of every row hold; all bytes of a page are equal."""
    found = []
    for row in table.rows:
        planes = [plane[row.blocks] for plane in (table.pool.index, table.pool.payload)]
        for plane in planes:
            assert (plane == plane[:, :1]).all()
        assert torch.equal(planes[0][:, 0], planes[1][:, 0])
        found.append(planes[0][:, 0].tolist())
    return found


def add(table, row, *fill):
    table.append(row, table.pool.add(*pages(*fill)), [8] * len(fill))


class Requests:
    """Three tables over one pool: `held` is let alone, `used` worked with, `other` for what interrupts."""

    def __init__(self):
        self.pool = BlockPool(FORMAT, torch.device("cpu"))
        self.held, self.used, self.other = (BlockTable(1, self.pool) for _ in range(3))
        for table, first in ((self.held, 0), (self.other, 10), (self.used, 20)):
            add(table, 0, first, first + 1, first + 2)
        self.used.crop(0, 20)

    def work(self, note=lambda: None):
        """Everything a table and its pool can do, calling `note` after each step."""
        used, pool = self.used, self.pool
        add(used, 0, 30, 31)
        note()
        used.tensors()
        used.crop(0, 12)
        note()
        fork = used.copied(share=True)
        used.select([0, 0])
        note()
        add(used, 1, 40)
        note()
        used.tensors()
        del fork
        pool.reserve(6)
        add(used, 0, *range(50, 57))
        note()
        used.crop(1, 0)
        note()
        add(used, 1, 60, 61)
        note()
        copy.deepcopy(pool)

    def check(self):
        """No page is free that somebody holds, pages stay while everything free is used, mirrors agree."""
        tables = [self.held, self.used, self.other]
        assert content(self.held) == [[0, 1, 2]]
        before = [content(table) for table in tables]
        blocks = [block for table in tables for row in table.rows for block in row.blocks]
        taken = self.pool.used
        assert taken >= len(set(blocks))
        assert not set(self.pool._free) & set(blocks)
        assert len(set(self.pool._free)) == len(self.pool._free)
        assert all(self.pool._references[block] >= blocks.count(block) for block in blocks)
        filler = BlockTable(1, self.pool)
        add(filler, 0, *[200] * (self.pool.capacity - taken + 1))
        assert [content(table) for table in tables] == before
        for table in tables:
            for mirror, rows in zip(
                table.tensors(), zip(*((r.blocks, r.counts) for r in table.rows), strict=True), strict=True
            ):
                assert mirror.tolist() == [x + [0] * (table.pages - len(x)) for x in rows]
        return taken - len(set(blocks))


def states():
    """What `used` holds after every step of the work."""
    requests, found = Requests(), []
    found.append(content(requests.used))
    requests.work(lambda: found.append(content(requests.used)))
    return found


@pytest.fixture
def few_objects():
    """The collector looks at what a test makes and not at all of PyTorch: it is called thousands of times."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_ctrl_c_at_any_line_leaves_every_table_in_one_of_its_states():
    expected, number = states(), 0
    while True:
        requests = Requests()
        with fault(AtLine, number) as injected:
            requests.work()
        requests.check()
        if not injected.happened:
            break
        assert content(requests.used) in expected
        # The work goes on; a page that was lost is found again by the time the pool has to grow.
        add(requests.used, 0, 70, 71)
        requests.check()
        number += 1
    assert number > 150


def test_pages_that_a_call_cut_short_took_are_found_again():
    number, lost = 0, 0
    while True:
        pool = BlockPool(FORMAT, torch.device("cpu"))
        pool.reserve(4)
        with fault(AtLine, number) as injected:
            pool.add(*pages(1, 2))
        lost += pool.used > sum(pool._references)
        pool.reserve(5)
        assert pool.used == sum(pool._references)
        if not injected.happened:
            break
        number += 1
    assert lost > 0


class Request:
    """In a cycle with itself, as a request is that an exception's traceback knows: the collector's."""

    def __init__(self, table):
        self.table, self.me = table, self


def with_garbage(requests):
    """Leave a fork to the collector that shares some pages and has others for itself."""
    request = Request(requests.other.copied(share=True))
    add(request.table, 0, 90, 91)


def test_the_collector_at_any_line_gives_no_page_to_two(few_objects):
    expected, number = states(), 0
    gc.disable()
    try:
        while True:
            requests, found = Requests(), []
            with_garbage(requests)
            with Meanwhile(number, gc.collect) as injected:
                requests.work(lambda: found.append(content(requests.used)))  # noqa: B023
            assert found == expected[1:]
            if not injected.happened:
                break
            assert requests.check() == 0, "a page was lost"
            number += 1
    finally:
        gc.enable()
    assert number > 150


def test_the_collector_at_its_own_moments_gives_no_page_to_two(few_objects):
    before = gc.get_threshold()
    for threshold in range(1, 300, 4):
        gc.disable()
        requests = Requests()
        with_garbage(requests)
        gc.set_threshold(threshold, 10**6, 10**6)
        gc.enable()
        try:
            requests.work()
        finally:
            gc.set_threshold(*before)
        gc.collect()
        assert content(requests.used) == states()[-1]
        assert requests.check() == 0


@pytest.mark.parametrize("what", ["crop", "add", "report"])
def test_a_signals_handler_is_right_or_refused(what):
    expected, number, refused = states(), 0, 0

    def handler():
        nonlocal refused
        try:
            if what == "crop":
                requests.other.crop(0, 8)
            elif what == "add":
                add(requests.other, 0, *range(80, 96))
            else:
                assert 0 < requests.pool.used <= requests.pool.capacity
        except StateError:
            refused += 1

    while True:
        requests = Requests()
        with Meanwhile(number, handler) as injected:
            requests.work()
        assert content(requests.used) == expected[-1]
        if not injected.happened:
            break
        assert requests.check() == 0
        number += 1
    assert (refused > 0) == (what == "add")
    assert number > refused


def test_tables_in_threads(few_objects):
    pool = BlockPool(FORMAT, torch.device("cpu"))
    prefix = BlockTable(1, pool)
    add(prefix, 0, 1, 2, 3)

    def work(i):
        table = BlockTable(1, pool)
        for n in range(60):
            fill = [10 + 20 * i + n % 20] * (1 + n % 3)
            add(table, 0, *fill)
            fork = Request(table.copied(share=True))
            add(fork.table, 0, 200)
            assert content(table)[0][-len(fill) :] == fill
            if n % 4 == 3:
                del fork
                table.crop(0, 16)
        return table

    with _switching():
        tables = at_once(4, work)
    gc.collect()
    assert content(prefix) == [[1, 2, 3]]
    assert [len(content(table)[0]) for table in tables] == [2] * 4
    assert pool.used == 3 + 2 * 4


@contextmanager
def _switching():
    """Threads take turns, and the collector runs, as often as they can."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20, 2, 2)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)


def test_a_table_that_never_got_its_rows_and_a_copy_of_a_table():
    pool = BlockPool(FORMAT, torch.device("cpu"))
    BlockTable.__new__(BlockTable).__del__()
    table = BlockTable(1, pool)
    add(table, 0, 1, 2)
    twin = copy.copy(table)
    del twin
    assert pool.used == 2
    add(pool_user := BlockTable(1, pool), 0, 9, 9, 9)
    assert content(table) == [[1, 2]]
    assert content(pool_user) == [[9, 9, 9]]
