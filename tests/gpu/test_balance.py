"""`measure_balance` on the GPU against the reference."""

import pytest
import torch
from pages import gaussian

from selfindex.backends import ops, reference
from selfindex.backends.fallback import observed

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "queries"), [(1, 2, 6, 144), (3, 1, 1, 5), (2, 4, 4, 0), (16, 8, 2, 144)]
)
def test_balance_agrees_with_the_reference(dim, dtype, batch, heads, groups, queries):
    loud = torch.linspace(0.1, 5, dim)
    # Tokens before heads, as they leave a projection; parts of longer prompts.
    query = (gaussian(batch, 200, heads * groups, dim, seed=1) * loud.flip(0)).to(dtype).cuda()
    keys = (gaussian(batch, 200, heads, dim, seed=2) * loud + 10).to(dtype).cuda()
    keys[..., 7] = 3  # channels that tell nothing
    query[..., 9], query[..., 9 + dim // 2] = 0, 0
    query, keys = query.transpose(1, 2)[:, :, 3 : 3 + queries], keys.transpose(1, 2)[:, :, 16:144]
    before, seen = gaussian(batch, heads, dim, seed=3).square().cuda(), 7 + queries
    calls = []
    with observed(lambda *call: calls.append(call[:2])):
        got = ops.measure_balance(query, keys, before, seen)
    assert calls == [("measure_balance", True)]
    wanted = reference.measure_balance(query, keys, before, seen)
    assert got.shape == wanted.shape == (batch, heads, dim)
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)
    assert torch.equal(ops.measure_balance(query, keys, before, seen), got)
    for b in range(batch):  # whatever the other rows are, and wherever it lies
        own = (x[b : b + 1].contiguous() for x in (query, keys, before))
        assert torch.equal(ops.measure_balance(*own, seen), got[b : b + 1])


def test_numbers_that_are_none_end_in_numbers_that_are_none_or_bounded():
    keys = gaussian(1, 2, 128, 128).cuda()
    keys[0, 0, 5, 9] = torch.nan
    query = gaussian(1, 4, 16, 128, seed=1).cuda()
    before = torch.zeros(1, 2, 128, device="cuda")
    balance = ops.measure_balance(query, keys, before, 16)
    wanted = reference.measure_balance(query, keys, before, 16)
    torch.testing.assert_close(balance[0, 1], wanted[0, 1], rtol=2e-5, atol=1e-6)
