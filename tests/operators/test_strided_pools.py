"""Operators on pools cut out of memory that an engine owns, against the same bytes in planes of their own."""

import pytest
import torch
from engine_memory import pools
from pages import PRESETS, encode, gaussian, page_format

from selfindex.backends import reference

TABLE = torch.tensor([[0, 4, 2], [3, 1, 0]], dtype=torch.int32)


@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (3, 1), (1, 4)])
@pytest.mark.parametrize("queries", [1, 3])
def test_operators_read_strided_pools(preset, bits, dim, heads, groups, queries):
    fmt = page_format(preset, bits, heads, dim)
    keys, values = gaussian(2, 5, heads, 16, dim, seed=dim)
    index, payload, constants = encode(fmt, keys, values)
    query = gaussian(2, heads * groups, queries, dim, seed=1)
    counts = torch.tensor([[9, 16, 3], [16, 16, 0]], dtype=torch.int32)
    budgets = torch.tensor([7, 0], dtype=torch.int32)
    slots = torch.randint(32, (2, heads, queries, 6), dtype=torch.int32)
    tail = constants.expand(2, -1, -1), dim**-0.5, fmt.name
    found = []
    for planes in ((index, payload), pools(fmt, index, payload), pools(fmt, index, payload, gap=32)):
        found.append(
            (
                reference.score(query, planes[0], TABLE, counts, *tail),
                *reference.sparse_attend(query, *planes, TABLE, slots, *tail),
                *reference.dense_attend(query, *planes, TABLE, counts, *tail),
                *reference.sparse_decode(query, *planes, TABLE, counts, budgets, 7, *tail),
            )
        )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    output, lse = found[0][-2:]
    assert not output[1].any()
    assert (lse[1] == -torch.inf).all(), "a budget of 0"
