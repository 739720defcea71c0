"""`window_attend`, the second half of a decode step, against `attend` and against dense attention."""

import pytest
import torch
from stores import fill, new_store, random_tokens, small_config

from selfindex.attention.attend import attend
from selfindex.backends import ops


@pytest.mark.parametrize("with_sink", [False, True])
def test_a_step_in_two_operators_equals_attend_and_append(with_sink):
    store = new_store(small_config(budget=5), batch=2)
    fill(store, 61)
    keys, values, query = random_tokens(store, 1, seed=9)
    sink = torch.linspace(-1, 1, query.shape[1]) if with_sink else None
    wanted, read = attend(store, query, keys, values, None, 0.125, sink)
    table, counts = store.table.tensors()
    budgets = torch.tensor(read, dtype=torch.int32)
    part = ops.sparse_decode(
        query, store.pool.index, store.pool.payload, table, counts, budgets, 5, store.constants, 0.125,
        store.format.name,
    )  # fmt: skip
    held = store.window.width
    store.window.reserve(held + 5)
    store.window.keys[:, :, held:] = torch.nan  # memory nobody wrote
    store.window.values[:, :, held:] = torch.nan
    lengths = torch.tensor(store.window.lengths, dtype=torch.int32)
    got = ops.window_attend(
        query, keys, values, store.window.keys, store.window.values, lengths, *part, sink, 0.125
    )
    torch.testing.assert_close(got, wanted.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert torch.equal(store.window.keys[:, :, held], keys[:, :, 0])
    assert torch.equal(store.window.values[:, :, held], values[:, :, 0])


def test_rows_of_different_length_without_an_encoded_part():
    generator = torch.Generator().manual_seed(0)
    query, new_k, new_v = (torch.randn(2, h, 1, 64, generator=generator) for h in (4, 2, 2))
    keys, values = (torch.randn(2, 2, 9, 64, generator=generator) for _ in range(2))
    lengths = torch.tensor([0, 6], dtype=torch.int32)
    nothing = torch.zeros(2, 4, 1, 64), torch.full((2, 4, 1), -torch.inf)
    got = ops.window_attend(query, new_k, new_v, keys, values, lengths, *nothing, None, 0.3)
    torch.testing.assert_close(got[0, 0], new_v[0].repeat_interleave(2, 0)[:, 0])
    k, v = (torch.cat((x[1:, :, :6], n[1:]), 2) for x, n in ((keys, new_k), (values, new_v)))
    wanted = torch.nn.functional.scaled_dot_product_attention(query[1:], k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got[1:], wanted.transpose(1, 2), atol=1e-5, rtol=1e-5)
