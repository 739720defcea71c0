"""Rows in host memory: what does not need a GPU. tests/gpu/test_offload.py has the rest."""

import contextlib
import copy
import gc
import sys
import weakref

import pytest
import torch
from pages import page_format

from selfindex import ConfigError, HostMemoryError
from selfindex.store import host
from selfindex.store.host import HostRows, _Range
from selfindex.store.pool import BlockPool

ROW = 768
CPU = torch.device("cpu")


def content(*fill):
    return torch.tensor(fill, dtype=torch.uint8)[:, None].expand(-1, ROW)


def grown(*sizes):
    """Rows that grew in these steps, and their borders."""
    rows, borders = HostRows(ROW, CPU), []
    for size in sizes:
        borders.append(rows.capacity)
        rows.grow(size)
    return rows, borders


def test_rows_keep_their_bytes_and_their_address_while_they_grow():
    rows = HostRows(ROW, CPU)
    places = set()
    for i in range(200):
        rows.grow(i + 1)
        rows.write([i], content(i))
        places.add(rows.data.data_ptr())
        assert rows.data.shape == (rows.capacity, ROW)
    assert len(places) == 1
    assert torch.equal(rows.data[:200], content(*range(200)))
    assert rows.capacity * ROW % 4096 == 0
    assert rows.capacity < 200 + 4096 // 256


def test_what_is_there_already_costs_nothing(monkeypatch):
    rows, _ = grown(10)
    monkeypatch.setattr(host, "available", lambda: 0)
    rows.grow(rows.capacity)
    assert rows.capacity >= 10


def test_copies_end_where_a_region_or_a_run_ends():
    rows, borders = grown(16, 20, 100)
    assert borders == [0, 16, 32]
    wanted = [*range(10, 40), 7, 8, 50, 60, 61]
    found = list(rows.runs(wanted))
    assert found == [(0, 10, 6), (6, 16, 16), (22, 32, 8), (30, 7, 2), (32, 50, 1), (33, 60, 2)]
    assert list(rows.runs([])) == []


def test_scattered_rows_are_written_and_read():
    rows, _ = grown(16, 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    rows.write(order, content(*range(48)))
    assert torch.equal(rows.read(order, CPU), content(*range(48)))
    assert torch.equal(rows.data[order], content(*range(48)))
    assert rows.read([], CPU).shape == (0, ROW)


def test_too_little_memory_is_refused_and_changes_nothing(monkeypatch):
    rows, _ = grown(16)
    rows.write([3], content(3))
    monkeypatch.setattr(host, "available", lambda: 5 << 20)
    with pytest.raises(HostMemoryError, match=r"needs 8 MiB more host memory, 5 MiB are available"):
        rows.grow(16 + (8 << 20) // ROW)
    monkeypatch.undo()
    with pytest.raises(HostMemoryError, match=r"may take \d+ GiB, no more"):
        rows.grow(1 << 40)
    assert rows.capacity == 16
    assert torch.equal(rows.data[3:4], content(3))
    rows.grow(17)
    assert rows.capacity == 32


def test_memory_that_is_available_is_what_the_system_says():
    assert 1 << 20 < host.available() < 1 << 50


def test_where_it_cannot_work_it_says_so(monkeypatch):
    with pytest.raises(ConfigError, match="not meta"):
        HostRows(ROW, torch.device("meta"))
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="needs Linux"):
        HostRows(ROW, CPU)


def test_the_memory_lives_as_long_as_a_tensor_on_it():
    rows, _ = grown(16)
    rows.write([0], content(9))
    memory, kept = weakref.ref(rows._range._memory), rows.data[0]
    del rows
    gc.collect()
    assert memory() is not None
    assert torch.equal(kept, content(9)[0])
    del kept
    gc.collect()
    assert memory() is None


FORMAT = page_format()


def pages(*fill):
    column = torch.tensor(fill, dtype=torch.uint8)[:, None]
    return column.expand(-1, FORMAT.index_bytes), column.expand(-1, FORMAT.payload_bytes)


@pytest.mark.parametrize("offloading", [False, True])
def test_a_pool_is_the_same_wherever_its_payload_is(offloading):
    pool = BlockPool(FORMAT, CPU, offloading)
    blocks = []
    for i in range(0, 60, 3):
        blocks += pool.add(*pages(i, i + 1, i + 2))
    pool.release(blocks[4:9])
    blocks[4:9] = pool.add(*pages(*range(4, 9)))
    for kind in pool.read(blocks, CPU):
        assert kind[:, 0].tolist() == kind[:, -1].tolist() == list(range(60))
    assert pool.index.shape[0] == pool.payload.shape[0] == pool.capacity
    assert pool.offloading == offloading


@pytest.mark.parametrize("offloading", [False, True])
def test_a_copy_of_a_pool_has_the_pages_and_goes_its_own_way(offloading):
    pool = BlockPool(FORMAT, CPU, offloading)
    blocks = pool.add(*pages(*range(40)))
    pool.release(blocks[:7])
    twin = copy.deepcopy(pool)
    assert (twin.used, twin.offloading) == (33, offloading)
    assert set(twin.add(*pages(*[200] * 7))) == set(blocks[:7])
    for kind in (pool.index, pool.payload):
        assert kind[blocks[:7], 0].tolist() == list(range(7))
    for kind in (twin.index, twin.payload):
        assert kind[blocks, 0].tolist() == [200] * 7 + list(range(7, 40))
    assert twin.payload.data_ptr() != pool.payload.data_ptr()


@pytest.fixture
def cudart(monkeypatch):
    """A CUDA runtime that keeps a list of what is pinned."""

    class Fake:
        pinned, trouble = [], None

        def cudaHostRegister(self, address, size, flags):
            self.pinned.append(address)
            self.have_trouble()
            return 0

        def cudaHostUnregister(self, address):
            self.pinned.remove(address)
            return 0

        def have_trouble(self, *_):
            if self.trouble is not None:
                raise self.trouble

    fake = Fake()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.have_trouble)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return fake


def test_ctrl_c_while_memory_is_pinned_leaves_nothing_pinned(cudart):
    region = _Range(CPU)
    region._device = torch.device("cuda", 0)
    cudart.trouble = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        region.use(4096)
    assert not cudart.pinned
    cudart.trouble = None
    region.use(4096)
    region.use(8192)
    assert region.regions == [(0, 4096), (4096, 8192)]
    assert cudart.pinned == [region.address, region.address + 4096]


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), RuntimeError("a graph is captured")], ids=repr)
def test_what_could_not_be_unpinned_is_unpinned_later(cudart, trouble):
    old, new = _Range(CPU), _Range(CPU)
    for region in (old, new):
        region._device = torch.device("cuda", 0)
    old.use(4096)
    cudart.trouble = trouble
    with pytest.raises(type(trouble)):
        host._unpin(old._memory, old.address, old.regions, old._device)
    assert cudart.pinned == [old.address]
    cudart.trouble = None
    new.use(4096)
    assert cudart.pinned == [new.address]
    assert not host._late
