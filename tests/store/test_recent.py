"""Bookkeeping of the tokens an offloaded pool keeps on the GPU; tests/gpu/test_offload.py has the rest."""

import gc

import pytest
import torch
from pages import page_format

from selfindex.backends.cuda import recent
from selfindex.backends.cuda.recent import WAYS, Recent

FORMAT = page_format(dim=128, page=128)


@pytest.fixture
def payload():
    return torch.zeros(40, FORMAT.payload_bytes, dtype=torch.uint8)


def test_it_is_found_by_the_address_of_its_pool_while_it_lives(payload):
    held = Recent(FORMAT, payload)
    assert Recent.of(payload[:3]) is held
    assert Recent.of(payload[1:]) is None
    del held
    gc.collect()
    assert Recent.of(payload) is None


def test_room_follows_the_selections_up_to_the_pool_and_never_shrinks(payload):
    held = Recent(FORMAT, payload)
    assert (held.sets, held.address) == (0, 0)
    held.fit(100, 40 * 128)
    first, sets = held.address, held.sets
    assert recent.SELECTIONS * 100 <= sets * WAYS <= 1.2 * recent.SELECTIONS * 100 + WAYS
    # 64 bytes, a value scale and an 8-byte word an entry, for two heads.
    assert held.nbytes == 2 * sets * WAYS * (64 + 1 + 8) + 16
    held.fit(100, 40 * 128)
    held.fit(20, 40 * 128)
    assert (held.address, held.sets) == (first, sets)
    held.fit(10**6, 40 * 128)
    assert 40 * 128 <= held.sets * WAYS <= 1.2 * 40 * 128
    assert held.params(0).sets == held.sets


def test_a_kernel_argument_outlives_a_change_of_room(payload):
    held = Recent(FORMAT, payload)
    held.fit(10, 40 * 128)
    params = held.params(0)
    held.fit(1000, 40 * 128)
    assert [x.data_ptr() for x in params.buffers] == [params.ways, params.data, params.scales]
    assert params.ways != held.address


def test_it_can_be_left_out(payload, monkeypatch):
    monkeypatch.setattr(recent, "SELECTIONS", 0)
    held = Recent(FORMAT, payload)
    held.fit(1000, 40 * 128)
    assert held.sets == 0
    held.forget([1, 2])


def test_without_memory_for_it_steps_go_on_without_it(payload, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory (for a test)")

    held = Recent(FORMAT, payload)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "full", full)
        held.fit(500, 40 * 128)
    assert held.sets == 0
    held.fit(600, 40 * 128)
    assert held.sets == 0, "what did not fit is not tried at every step"
    held.fit(50, 40 * 128)
    assert held.sets * WAYS >= 200


def test_blocks_that_change_are_forgotten_and_no_others(payload):
    held = Recent(FORMAT, payload)
    held.fit(100, 40 * 128)
    ways, now = held._buffers[0], 4_000_000_000  # the largest steps do not reach into the token
    blocks = torch.randint(0, 40, ways.shape, generator=torch.Generator().manual_seed(0))
    ways.copy_((blocks * 128 + torch.arange(len(ways)) % 128) << 32 | now)
    ways[::5] = -1
    before = ways.clone()
    held.forget([0, 7, 39])
    gone = (blocks == 0) | (blocks == 7) | (blocks == 39)
    assert (ways[gone] == -1).all()
    assert torch.equal(ways[~gone], before[~gone])
