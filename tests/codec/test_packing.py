import torch
from hypothesis import given
from hypothesis import strategies as st

from selfindex.codec import packing

shapes = st.lists(st.integers(0, 3), max_size=2)


def codes(shape, length, most, seed):
    return torch.randint(0, most + 1, (*shape, length), generator=torch.Generator().manual_seed(seed))


@given(shapes, st.integers(0, 12), st.integers(0, 2**31))
def test_bits_round_trip(shape, eights, seed):
    bits = codes(shape, 8 * eights, 1, seed).bool()
    packed = packing.pack_bits(bits)
    assert packed.shape == (*shape, eights)
    assert packed.dtype == torch.uint8
    assert torch.equal(packing.unpack_bits(packed), bits)


@given(shapes, st.integers(0, 12), st.integers(0, 2**31))
def test_crumbs_round_trip(shape, fours, seed):
    crumbs = codes(shape, 4 * fours, 3, seed)
    packed = packing.pack_crumbs(crumbs)
    assert packed.shape == (*shape, fours)
    assert packed.dtype == torch.uint8
    assert torch.equal(packing.unpack_crumbs(packed).long(), crumbs)


@given(st.integers(1, 12), st.integers(0, 2**31))
def test_bytes_survive_unpacking(count, seed):
    packed = codes((), count, 255, seed).to(torch.uint8)
    assert torch.equal(packing.pack_bits(packing.unpack_bits(packed)), packed)
    assert torch.equal(packing.pack_crumbs(packing.unpack_crumbs(packed)), packed)


def test_bit_order_is_pinned():
    # Channel i is bit i % 8 of byte i // 8, and 2-bit code i is bits 2 (i % 4) of byte i // 4.
    bits = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]).bool()
    assert packing.pack_bits(bits).tolist() == [0b10000001, 0b00000010]
    assert packing.pack_crumbs(torch.tensor([3, 0, 2, 1, 0, 1, 0, 0])).tolist() == [0b01100011, 0b00000100]


def test_group_codes_are_the_signs_of_four_channels():
    bits = torch.randint(0, 2, (5, 64)).bool()
    codes_of_groups = packing.group_codes(packing.pack_bits(bits))
    wanted = (bits.unflatten(-1, (-1, 4)) * torch.tensor([1, 2, 4, 8])).sum(-1)
    assert torch.equal(codes_of_groups.long(), wanted)
