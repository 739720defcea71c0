"""Compiled `sparse_decode` against the reference."""

import pytest
import torch
from encoded_cache import make_cache
from hypothesis import given
from hypothesis import strategies as st
from pages import relative_error

from selfindex.backends import ops, reference
from selfindex.backends.cpu.operators import sparse_decode

SHAPES = [
    # dim, heads, groups, bits, page, queries, dtype
    (64, 3, 3, 2, 128, 1, torch.float32),
    (64, 1, 16, 3, 128, 1, torch.bfloat16),
    (80, 2, 1, 2, 128, 1, torch.float16),
    (80, 1, 7, 3, 40, 2, torch.float32),
    (96, 2, 4, 2, 64, 1, torch.bfloat16),
    (96, 1, 5, 3, 8, 3, torch.float16),
    (128, 2, 4, 2, 128, 1, torch.bfloat16),
    (128, 1, 8, 3, 128, 4, torch.float32),
    (192, 1, 2, 2, 24, 1, torch.float32),
    (192, 2, 4, 3, 128, 1, torch.bfloat16),
    (256, 1, 4, 2, 128, 2, torch.float32),
    (256, 1, 12, 3, 1024, 1, torch.float16),
]


every_preset = pytest.mark.parametrize("preset", ["balanced", "paper"])


def check(cache, budgets, width=None):
    """Selection nearly as good as the reference's; attention over it the reference's.

    That of `paper` is the reference's but for near-ties; `balanced` selects by votes of all heads.
    """
    output, lse, chosen = cache.decode(budgets, width)
    votes = cache.votes()
    best = reference.select(votes, cache.decode_arguments(budgets, width)[5], chosen.shape[-1])
    for b, budget in enumerate(budgets):
        assert (chosen[b, ..., budget:] == -1).all()
        mine, wanted = chosen[b, ..., :budget].long(), best[b, ..., :budget].long()
        assert (mine[..., 1:] > mine[..., :-1]).all(), "ascending"
        got, most = votes[b].gather(-1, mine), votes[b].gather(-1, wanted)
        assert torch.isfinite(got).all(), "only slots with a token"
        if cache.fmt.preset == "balanced":
            assert (got.sum(-1) >= 0.998 * most.sum(-1)).all()
        elif budget:
            assert (got.amin(-1) >= most.amin(-1) - cache.near_tie()[b]).all()
            assert (got.sort(-1).values >= most.sort(-1).values - cache.near_tie()[b, ..., None]).all()
    wanted_output, wanted_lse = cache.attend(chosen)
    assert relative_error(output, wanted_output) < 2e-4
    torch.testing.assert_close(lse, wanted_lse, atol=5e-4, rtol=0)
    return output, lse, chosen


@every_preset
@pytest.mark.parametrize(("dim", "heads", "groups", "bits", "page", "queries", "dtype"), SHAPES, ids=str)
def test_decode_agrees_with_the_reference(isa, preset, dim, heads, groups, bits, page, queries, dtype):
    shape = dim, heads, groups, bits, page, queries, dtype
    cache = make_cache([2100, 41, 1300], *shape, short=(3, 5), preset=preset)
    have = cache.tokens
    budgets = [200, have[1], 130]
    output, lse, _ = check(cache, budgets, width=230)
    again = ops.sparse_decode(*cache.decode_arguments(budgets, width=230))
    assert torch.equal(again[0], output)
    assert torch.equal(again[1], lse)


@given(
    rows=st.lists(st.integers(0, 300), min_size=1, max_size=4),
    page=st.sampled_from([8, 16, 40, 128]),
    groups=st.integers(1, 6),
    share=st.floats(0, 1),
    short=st.lists(st.integers(0, 4), max_size=2),
    shared=st.booleans(),
    preset=st.sampled_from(["balanced", "paper"]),
)
def test_ragged_rows(isa_of_module, rows, page, groups, share, short, shared, preset):
    rows = rows if any(rows) else [5]
    cache = make_cache(rows, groups=groups, page=page, short=short, shared=shared, preset=preset)
    check(cache, [round(share * n) for n in cache.tokens])


@pytest.fixture(params=["avx2", "generic"])
def isa_of_module(request, monkeypatch):
    """As `isa`, for a test whose examples share one setting."""
    request.getfixturevalue("backend")
    monkeypatch.setenv("SELFINDEX_CPU", request.param)


@every_preset
def test_instruction_sets_select_alike(isa, monkeypatch, preset):
    cache = make_cache([3000], dim=128, groups=4, preset=preset)
    output, lse, chosen = cache.decode([150])
    monkeypatch.setenv("SELFINDEX_CPU", "generic")
    plain = cache.decode([150])
    assert len(set(chosen.flatten().tolist()) ^ set(plain[2].flatten().tolist())) <= 2
    torch.testing.assert_close(output, plain[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(lse, plain[1], atol=1e-3, rtol=0)


@every_preset
def test_threads_do_not_change_the_result(isa, preset):
    cache = make_cache([5000, 900], dim=64, groups=3, preset=preset)
    alone = cache.decode([250, 128])
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            for one, other in zip(cache.decode([250, 128]), alone, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(1)


@every_preset
def test_a_row_without_tokens_or_budget_gives_no_weight(isa, preset):
    cache = make_cache([700, 0, 700], preset=preset)
    output, lse = sparse_decode(*cache.decode_arguments([50, 0, 0]))
    assert torch.isfinite(output).all()
    assert (lse[1:] == -torch.inf).all()
    assert (output[1:] == 0).all()
    assert torch.isfinite(lse[0]).all()


@every_preset
def test_budgets_beyond_a_rows_tokens_read_what_there_is(isa, preset):
    cache = make_cache([300, 900], preset=preset)
    output, lse, chosen = cache.decode([800, 800])
    assert (chosen[0, ..., :300] == torch.arange(300)).all()
    assert (chosen[0, ..., 300:] == -1).all()
    exact = cache.decode([300, 800], width=800)
    assert torch.equal(output, exact[0])
    assert torch.equal(lse, exact[1])


@every_preset
def test_constants_per_row_and_a_strided_query(isa, preset):
    cache = make_cache([900, 500], preset=preset)
    cache.constants = torch.cat((cache.constants, 2 * cache.constants))
    cache.query = cache.query.transpose(1, 2).contiguous().transpose(1, 2)
    check(cache, [60, 50])


@every_preset
def test_queries_of_zeros_and_of_nan(isa, preset):
    cache = make_cache([500, 500], preset=preset)
    cache.query[0] = 0
    cache.query[1] = torch.nan
    output, lse, chosen = cache.decode([40, 40])
    assert (chosen[0] == torch.arange(40)).all(), "equal scores: the lower slots"
    assert torch.isfinite(output[0]).all()
    assert torch.isfinite(lse[0]).all()
    assert output[1].isnan().all(), "not hidden"


@every_preset
def test_a_block_outside_the_pool_is_refused(isa, preset):
    cache = make_cache([500], preset=preset)
    cache.table[0, 1] = cache.index.shape[0]
    with pytest.raises(IndexError, match="outside the pool"):
        cache.decode([40])


def test_a_channel_far_louder_than_the_others_does_not_blur_the_paper_presets_selection(isa):
    cache = make_cache([4000], 128, 2, 4, preset="paper")
    cache.query[..., 5] *= 100
    check(cache, [200])
    chosen = cache.decode([200])[2].flatten(0, 2)
    wanted = reference.select(cache.votes(), torch.tensor([200], dtype=torch.int32), 200).flatten(0, 2)
    for mine, others in zip(chosen.tolist(), wanted.tolist(), strict=True):
        assert len(set(mine) - set(others)) <= 2
