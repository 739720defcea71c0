"""Compiled `encode_into` and `encode_paged`: the bytes of the compiled `encode`, in given blocks."""

import pytest
import torch
from engine_memory import empty_pools, pools, window
from pages import constants_for, gaussian, page_format

from selfindex.backends import ops

DIMS = (64, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(found, wanted, blocks):
    """Pools hold these pages in these blocks, and elsewhere what `empty_pools` put there."""
    for pool, planes in zip(found, wanted, strict=True):
        expected = torch.full_like(pool, 0x5A)
        for block, page in zip(blocks, planes, strict=True):
            if block >= 0:
                expected[block] = page
        assert torch.equal(pool, expected)


def tokens(heads, count, dim, dtype, batch=4):
    """Keys and values [n, H, tokens, d] whose heads lie apart, as they leave a projection."""
    return gaussian(2, batch, count, heads, dim, seed=dim, dtype=dtype).transpose(2, 3)


every_preset = pytest.mark.parametrize("preset", ["balanced", "paper"])


def own_bits(preset, bits):
    """Value bits: those of `balanced`, 2 of `paper`."""
    return bits if preset == "balanced" else 2


@every_preset
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(
    ("heads", "bits", "page", "dtype"), zip((1, 2, 3), (2, 3, 2), (128, 24, 16), DTYPES, strict=True)
)
@pytest.mark.parametrize("blocks", [(5, 0, 3, 7), (-1, 6, -1, 1), (-1, -1, -1, -9)])
def test_encode_into_writes_the_bytes_of_encode(isa, preset, dim, heads, bits, page, dtype, blocks):
    fmt = page_format(preset, own_bits(preset, bits), heads, dim, page)
    keys, values = tokens(heads, page, dim, dtype)
    counts = torch.tensor([page, 1, page - 3, 0], dtype=torch.int32)
    constants = constants_for(fmt, keys)
    wanted = ops.encode(keys, values, counts, constants, fmt.name)
    for b, n in enumerate(counts.tolist()):
        keys[b, :, n:], values[b, :, n:] = torch.nan, torch.inf  # is not looked at
    found, where = empty_pools(fmt, 8), torch.tensor(blocks, dtype=torch.int32)
    ops.encode_into(keys, values, counts, where, *found, constants, fmt.name)
    check(found, wanted, blocks)


@every_preset
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("heads", "bits", "dtype"), zip((1, 2, 3), (2, 3, 2), DTYPES, strict=True))
@pytest.mark.parametrize("size", [8, 16])
def test_encode_paged_takes_its_tokens_from_blocks(isa, preset, dim, heads, bits, dtype, size):
    fmt = page_format(preset, own_bits(preset, bits), heads, dim)
    keys, values = tokens(heads, 50, dim, dtype)
    held, table = window(keys, values, [40, 16, -1, 50], size)
    # A short first page, from the middle of a block; a whole one; one of no row; a short last one.
    first = torch.tensor([5, 0, -16, 43], dtype=torch.int32)
    counts = torch.tensor([11, 16, 16, 7], dtype=torch.int32)
    blocks = torch.tensor([2, 0, -1, 4], dtype=torch.int32)
    own = constants_for(fmt, keys) * (0.5 + torch.arange(4)[:, None, None])  # constants per row
    found, before = empty_pools(fmt, 6), held.clone()
    ops.encode_paged(held, table, first, counts, blocks, *found, own, fmt.name)
    packed = []
    for x in (keys, values):
        plane = x.new_zeros(4, heads, 16, dim)
        for b in (0, 1, 3):
            plane[b, :, : counts[b]] = x[b, :, first[b] : first[b] + counts[b]]
        packed.append(plane)
    check(found, ops.encode(*packed, counts, own, fmt.name), blocks.tolist())
    torch.testing.assert_close(held, before, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_encode_reads_nothing(isa):
    fmt = page_format()
    held, table = window(*gaussian(2, 2, 2, 8, 64), [3, -1])
    none, wrong = torch.full((2,), -1, dtype=torch.int32), torch.full_like(table, 1 << 30)
    found = empty_pools(fmt, 2)
    ops.encode_paged(held, wrong, none, none, none, *found, torch.ones(1, 2, 64), fmt.name)
    check(found, found, [-1, -1])


@every_preset
def test_threads_do_not_change_the_bytes(isa, preset):
    fmt = page_format(preset, 2, 3, 64, 128)
    keys, values = tokens(3, 128, 64, torch.float32)
    counts, blocks = torch.full((4,), 128, dtype=torch.int32), torch.tensor([3, -1, 0, 1], dtype=torch.int32)
    found = empty_pools(fmt, 4), empty_pools(fmt, 4)
    for threads, each in zip((1, 3), found, strict=True):
        torch.set_num_threads(threads)
        try:
            ops.encode_into(keys, values, counts, blocks, *each, constants_for(fmt, keys), fmt.name)
        finally:
            torch.set_num_threads(1)
    assert all(map(torch.equal, *found))


@every_preset
def test_places_that_do_not_exist_are_refused_before_anything_is_written(isa, preset):
    fmt = page_format(preset)
    keys, values = tokens(2, 16, 64, torch.float32, batch=2)
    constants, counts = constants_for(fmt, keys), torch.full((2,), 16, dtype=torch.int32)
    found = empty_pools(fmt, 3)
    where = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(IndexError, match="outside the pool"):
        ops.encode_into(keys, values, counts, where, *found, constants, fmt.name)
    held, table = window(keys, values, [15, 15])
    first, ends = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)

    def encode(table=table, first=first, blocks=where):
        ops.encode_paged(held, table, first, counts, blocks, *found, constants, fmt.name)

    with pytest.raises(IndexError, match="outside the pool"):
        encode()
    for step in (-1, 1):
        with pytest.raises(IndexError, match="outside the window's table"):
            encode(first=step * ends, blocks=ends)
    for block in (-1, len(held)):
        wrong = table.clone()
        wrong[1] = block
        with pytest.raises(IndexError, match="outside the window"):
            encode(table=wrong, blocks=ends)
    check(found, found, [-1] * 3)


@every_preset
@pytest.mark.parametrize("gap", [0, 48])
def test_pools_of_the_same_bytes_far_apart_are_read_alike(isa, preset, gap):
    from encoded_cache import make_cache

    for dim, heads, groups, page, queries in (
        (64, 3, 3, 128, 1), (96, 2, 1, 24, 2), (128, 1, 8, 128, 1), (256, 2, 4, 8, 100),
    ):  # fmt: skip
        shape = dim, heads, groups, 2, page, queries, torch.bfloat16
        cache = make_cache([900, 0, 61], *shape, short=(1, 2), preset=preset)
        together = *cache.decode([100, 0, 50]), *ops.dense_attend(*cache.dense_arguments())
        cache.index, cache.payload = pools(cache.fmt, cache.index, cache.payload, gap)
        apart = *cache.decode([100, 0, 50]), *ops.dense_attend(*cache.dense_arguments())
        assert all(map(torch.equal, together, apart))
        for part in (apart[1], apart[4]):
            assert (part[1] == -torch.inf).all(), "a row without pages"
