"""`select_blocks` and `block_attend` against their definitions, one block or one pair at a time."""

import backends
import pytest
import torch
from prompts import attend_selected, estimated, random_prompt, selected

from selfindex.backends import ops
from selfindex.backends.operators import select_blocks as module
from selfindex.backends.operators.select_blocks import ALWAYS, BLOCK, most_blocks

SCALING = 0.125
LENGTHS = [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 9 * BLOCK + 17]
CHUNKS = [
    (1, 700),
    (90, 300),
    (BLOCK, 4 * BLOCK),
    (200, 5 * BLOCK),
    (300, 999),
    (BLOCK + 1, 2 * BLOCK + 1),
    (700, 704),
]
"""Queries, and all tokens that they are the last of."""
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("mass", "density"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (0.7, 0.6), (1e-6, 1e-6)])
def test_the_best_blocks_are_selected(tokens, mass, density):
    query, keys, _ = random_prompt(tokens, batch=2)
    check_selection(query, keys, mass, density)


@pytest.mark.parametrize(("queries", "tokens"), CHUNKS)
@pytest.mark.parametrize(("mass", "density"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (0.7, 0.6)])
def test_the_best_blocks_are_selected_for_a_chunk(queries, tokens, mass, density):
    query, keys, _ = random_prompt(tokens, batch=2)
    check_selection(query[:, :, -queries:], keys, mass, density)


def check_selection(query, keys, mass, density):
    queries, tokens = query.shape[2], keys.shape[2]
    blocks, counts = ops.select_blocks(query, keys, SCALING, mass, density)
    assert blocks.shape[-1] == most_blocks(tokens, density)
    kept, shares = selected(blocks, counts, tokens, queries), estimated(query, keys, SCALING)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        mine, share, own = kept[tuple(at)], shares[tuple(at)], at[-1] + (tokens - queries) // BLOCK
        always = {0, max(0, own - 1), own}
        most = max(min(own + 1, ALWAYS), -(-density * (own + 1) // 1))
        order = sorted(always) + sorted(set(range(own + 1)) - always, key=lambda j: -share[j])
        number = len(always)
        while number < min(most, own + 1) and (mass >= 1 or share[order[:number]].sum() < mass - 1e-5):
            number += 1
        assert set(mine.nonzero().flatten().tolist()) == set(order[:number])


@pytest.mark.parametrize("mass", [0.3, 0.8, 0.95, 0.999])
def test_what_is_kept_holds_the_target_mass(mass):
    query, keys, _ = random_prompt(12 * BLOCK)
    kept = selected(*ops.select_blocks(query, keys, SCALING, mass, 1.0))
    held = (estimated(query, keys, SCALING) * kept).sum(-1)
    assert (held >= mass - 1e-5).all()
    more = selected(*ops.select_blocks(query, keys, SCALING, min(1.0, mass + 0.04), 1.0))
    assert (more >= kept).all()


@pytest.mark.parametrize("last", [11 * BLOCK + 5, 4 * BLOCK + 50])
def test_selection_is_the_same_each_time_and_in_pieces(last, monkeypatch):
    query, keys, _ = random_prompt(11 * BLOCK + 5, batch=2)
    call = query[:, :, -last:], keys, SCALING, 0.7, 0.8
    whole, again = ops.select_blocks(*call), ops.select_blocks(*call)
    monkeypatch.setattr(module, "LOGITS", 1)
    pieces = ops.select_blocks(*call)
    for one, two, three in zip(whole, again, pieces, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_equal_blocks_are_taken_in_order():
    query, keys, _ = random_prompt(9 * BLOCK)
    blocks, counts = ops.select_blocks(0 * query, keys, SCALING, 1.0, 0.5)
    assert blocks[0, 0, 8].tolist() == [0, 1, 2, 7, 8]
    assert counts[0, 0].tolist() == [1, 2, 3, 3, 3, 3, 4, 4, 5]


@backends.on_cpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(2, 3, 64), (1, 4, 96), (3, 1, 128)])
def test_attention_to_selected_blocks(tokens, dtype, heads, groups, dim):
    query, keys, values = random_prompt(tokens, 2, heads, groups, dim, dtype)
    blocks, counts = ops.select_blocks(query, keys, SCALING, 0.6, 0.9)
    output, lse = ops.block_attend(query, keys, values, blocks, counts, SCALING)
    wanted, wanted_lse = attend_selected(query, keys, values, selected(blocks, counts), SCALING)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    assert output.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(output.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, wanted_lse, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("last", [2 * BLOCK, 5 * BLOCK, 1])
def test_whole_blocks_of_a_chunk_select_what_they_do_in_the_prompt(last):
    query, keys, _ = random_prompt(9 * BLOCK, batch=2)
    wanted = ops.select_blocks(query, keys, SCALING, 0.8, 0.7)
    got = ops.select_blocks(query[:, :, -last:], keys, SCALING, 0.8, 0.7)
    number = got[1].shape[2]
    if last % BLOCK == 0:
        assert all(torch.equal(one, other[:, :, -number:]) for one, other in zip(got, wanted, strict=True))
    assert number == -(-last // BLOCK)


@backends.on_cpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("queries", "tokens"), CHUNKS)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(2, 3, 64), (1, 4, 96), (3, 1, 128), (1, 7, 256)])
def test_attention_of_a_chunk_to_selected_blocks(queries, tokens, dtype, heads, groups, dim, backend):
    query, keys, values = random_prompt(tokens, 2, heads, groups, dim, dtype)
    query = query[:, :, -queries:]
    blocks, counts = ops.select_blocks(query, keys, SCALING, 0.6, 0.9)
    output, lse = ops.block_attend(query, keys, values, blocks, counts, SCALING)
    kept = selected(blocks, counts, tokens, queries)
    wanted, wanted_lse = attend_selected(query, keys, values, kept, SCALING)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(output.float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse, wanted_lse, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    backend.check_ran("block_attend")


@backends.on_cpu
def test_all_blocks_are_dense_attention(backend):
    query, keys, values = random_prompt(7 * BLOCK + 3, batch=2)
    selection = ops.select_blocks(query, keys, SCALING, 1.0, 1.0)
    got = ops.block_attend(query, keys, values, *selection, SCALING)[0]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=SCALING, enable_gqa=True
    )
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
    backend.check_ran("block_attend")


@backends.on_cpu
def test_attention_is_the_same_each_time():
    query, keys, values = random_prompt(6 * BLOCK + 50)
    selection = ops.select_blocks(query, keys, SCALING, 0.8, 1.0)
    one, two = (ops.block_attend(query, keys, values, *selection, SCALING) for _ in range(2))
    assert all(map(torch.equal, one, two))


def test_without_pytorchs_private_operator_the_reference_runs(monkeypatch):
    from selfindex.backends.cpu import blocks as fast
    from selfindex.backends.fallback import announce

    announce.cache_clear()
    monkeypatch.delenv("SELFINDEX_CPU", raising=False)
    monkeypatch.setattr(fast, "OPERATOR", "renamed")
    query, keys, values = random_prompt(4 * BLOCK)
    selection = ops.select_blocks(query, keys, SCALING, 0.8, 1.0)
    with pytest.warns(RuntimeWarning, match="has no renamed"):
        got = ops.block_attend(query, keys, values, *selection, SCALING)[0]
    wanted = attend_selected(query, keys, values, selected(*selection), SCALING)[0]
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-5)
