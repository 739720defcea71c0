"""Bookkeeping of the tokens an offloaded pool keeps on the GPU; tests/gpu/test_offload.py has the rest."""

import pytest
import torch
from pages import PRESETS, page_format

from selfindex.backends.cuda import recent
from selfindex.backends.cuda.recent import HEADER, WAYS, Recent, RecentParams

FORMAT = page_format(dim=128, page=128)


@pytest.fixture
def held():
    return Recent(FORMAT, torch.device("cpu"))


def test_it_serves_what_the_kernels_serve():
    assert Recent.serves(FORMAT)
    assert not any(map(Recent.serves, (page_format(dim=80, page=128), page_format(), page_format("paper"))))


def test_room_follows_the_selections_up_to_the_pool_and_never_shrinks(held):
    assert (held.sets, held.address, held.tensor.numel()) == (0, 0, 0)
    held.fit(100, 40 * 128)
    first, sets = held.address, held.sets
    assert recent.SELECTIONS * 100 <= sets * WAYS <= 1.2 * recent.SELECTIONS * 100 + WAYS
    # 64 bytes, a value scale and an 8-byte word an entry, for two heads.
    assert held.tensor.numel() == 2 * sets * WAYS * (64 + 1 + 8) + HEADER
    held.fit(100, 40 * 128)
    held.fit(20, 40 * 128)
    assert (held.address, held.sets) == (first, sets)
    held.fit(10**6, 40 * 128)
    assert 40 * 128 <= held.sets * WAYS <= 1.2 * 40 * 128


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_the_kernels_find_its_parts_side_by_side(dim, preset, bits):
    fmt = page_format(preset, bits=bits, heads=3, dim=dim, page=128)
    held = Recent(fmt, torch.device("cpu"))
    held.fit(77, 40 * 128)
    params = RecentParams.of(held.tensor, torch.empty(4), fmt)
    token = fmt.payload.record // 128 if preset == "paper" else dim // 2 + (dim // 8 if bits == 3 else 0)
    entries, entry = 3 * WAYS * params.sets, -(-token // 16) * 16
    assert params.sets == held.sets
    assert (params.clock, params.fetched) == (held.address, held.address + 8)
    assert params.ways == held.address + HEADER == held.ways.data_ptr()
    assert params.data == params.ways + 8 * entries
    assert params.data % 16 == 0
    assert params.scales == params.data + entry * entries
    end = held.address + held.tensor.numel()
    assert params.scales + (0 if preset == "paper" else entries) == end, "paper: part of an entry"
    assert (held.ways == -1).all()
    assert len(held.ways) == entries


def test_what_was_fetched_is_still_known_when_room_grows(held):
    held.fit(10, 40 * 128)
    held.tensor[8:HEADER].view(torch.int64).fill_(123456789)
    held.fit(1000, 40 * 128)
    assert held.fetched == 123456789


def test_it_can_be_left_out(held, monkeypatch):
    monkeypatch.setattr(recent, "SELECTIONS", 0)
    held.fit(1000, 40 * 128)
    assert held.sets == held.fetched == held.tensor.numel() == 0
    held.forget([1, 2])


def test_without_memory_for_it_steps_go_on_without_it(held, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory (for a test)")

    held.fit(10, 40 * 128)
    held.tensor[8:HEADER].view(torch.int64).fill_(7)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", full)
        held.fit(500, 40 * 128)
    assert held.sets == 0
    assert held.fetched == 7
    held.fit(600, 40 * 128)
    assert held.sets == 0, "what did not fit is not tried at every step"
    held.fit(50, 40 * 128)
    assert held.sets * WAYS >= 200


def test_blocks_that_change_are_forgotten_and_no_others(held):
    held.fit(100, 40 * 128)
    ways, now = held.ways, 4_000_000_000  # the largest steps do not reach into the token
    blocks = torch.randint(0, 40, ways.shape, generator=torch.Generator().manual_seed(0))
    ways.copy_((blocks * 128 + torch.arange(len(ways)) % 128) << 32 | now)
    ways[::5] = -1
    before = ways.clone()
    held.forget([0, 7, 39])
    gone = (blocks == 0) | (blocks == 7) | (blocks == 39)
    assert (ways[gone] == -1).all()
    assert torch.equal(ways[~gone], before[~gone])
