"""`encode_into` and `encode_paged` against `encode`."""

import pytest
import torch
from engine_memory import check_pools, empty_pools, window
from pages import PRESETS, constants_for, gaussian, page_format

from selfindex.backends import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "dtype"), zip((1, 2, 3), DTYPES, strict=True))
@pytest.mark.parametrize("blocks", [(5, 0, 3, 7), (-1, 6, -1, 1), (-1, -1, -1, -1), (-1, -1, 2, -7)])
def test_encode_into_writes_the_bytes_of_encode(preset, bits, dim, heads, dtype, blocks):
    fmt = page_format(preset, bits, heads, dim)
    # Tokens before heads, as they leave a projection.
    keys, values = gaussian(2, 4, 16, heads, dim, seed=dim, dtype=dtype).transpose(2, 3)
    counts = torch.tensor([16, 1, 16, 11], dtype=torch.int32)
    constants = constants_for(fmt, keys)
    wanted = reference.encode(keys, values, counts, constants, fmt.name)
    for b, n in enumerate(counts.tolist()):
        keys[b, :, n:], values[b, :, n:] = torch.nan, torch.inf  # is not looked at
    pools = empty_pools(fmt, 8)
    where = torch.tensor(blocks, dtype=torch.int32)
    reference.encode_into(keys, values, counts, where, *pools, constants, fmt.name)
    check_pools(pools, wanted, blocks)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_pages_may_have_constants_of_their_own(preset):
    fmt = page_format(preset)
    keys, values = gaussian(2, 40, 2, 16, 64, seed=1)  # more than are encoded at a time
    counts = torch.full((40,), 16, dtype=torch.int32)
    own = torch.cat([constants_for(fmt, keys[i : i + 1]) * (1 + i / 40) for i in range(40)])
    blocks = torch.arange(40, dtype=torch.int32).flip(0)
    blocks[3] = -1
    pools = empty_pools(fmt, 40)
    reference.encode_into(keys, values, counts, blocks, *pools, own, fmt.name)
    alone = [
        reference.encode(keys[i : i + 1], values[i : i + 1], counts[:1], own[i : i + 1], fmt.name)
        for i in range(40)
    ]
    check_pools(pools, [torch.cat(planes) for planes in zip(*alone, strict=True)], blocks.tolist())


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "dtype"), zip((1, 2, 3), DTYPES, strict=True))
@pytest.mark.parametrize("size", [8, 16])
def test_encode_paged_takes_its_tokens_from_blocks(preset, bits, dim, heads, dtype, size):
    fmt = page_format(preset, bits, heads, dim)
    keys, values = gaussian(2, 4, heads, 50, dim, seed=dim, dtype=dtype)
    held, table = window(keys, values, [40, 16, -1, 50], size)
    # A short first page, from the middle of a block; a whole one; one of no row; a short last one.
    first = torch.tensor([5, 0, -16, 43], dtype=torch.int32)
    counts = torch.tensor([11, 16, 16, 7], dtype=torch.int32)
    blocks = torch.tensor([2, 0, -1, 4], dtype=torch.int32)
    constants = constants_for(fmt, keys)
    pools, before = empty_pools(fmt, 6), held.clone()
    reference.encode_paged(held, table, first, counts, blocks, *pools, constants, fmt.name)
    own = []
    for x in (keys, values):
        pages = x.new_zeros(4, heads, 16, dim)
        for b in (0, 1, 3):
            pages[b, :, : counts[b]] = x[b, :, first[b] : first[b] + counts[b]]
        own.append(pages)
    check_pools(pools, reference.encode(*own, counts, constants, fmt.name), blocks.tolist())
    torch.testing.assert_close(held, before, rtol=0, atol=0, equal_nan=True)


def test_nothing_to_encode_reads_nothing():
    fmt = page_format()
    held, table = window(*gaussian(2, 2, 2, 8, 64), [3, -1])
    none = torch.full((2,), -1, dtype=torch.int32)
    pools = empty_pools(fmt, 2)
    wrong = torch.full_like(table, 1 << 30)
    ones = torch.ones(1, 2, 64)
    reference.encode_paged(held, wrong, none, none, none, *pools, ones, fmt.name)
    check_pools(pools, pools, [-1, -1])
