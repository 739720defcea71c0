"""Compiled `step_attend` against the compiled operators it is made of, which have tests of their own."""

import pytest
import torch
from encoded_cache import make_cache
from engine_memory import pools
from pages import gaussian

from selfindex.backends import ops, reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LENGTHS, ROOM = [39, 0, 17], 40


def arguments(cache, with_sink=False, budgets=None):
    """A step over an encoded cache of three rows, and windows of `LENGTHS` tokens."""
    dtype, (heads, dim) = cache.query.dtype, (cache.fmt.kv_heads, cache.fmt.head_dim)
    query_heads = cache.query.shape[1]
    # Heads of a projection's output lie side by side, as in a model.
    query = cache.query.transpose(1, 2).contiguous().transpose(1, 2)
    new = gaussian(2, 3, 1, heads, dim, seed=2).to(dtype).transpose(2, 3)
    keys, values = gaussian(2, 3, heads, ROOM, dim, seed=3).to(dtype).clone()
    for b, n in enumerate(LENGTHS):
        keys[b, :, n:], values[b, :, n:] = torch.nan, torch.nan  # memory nobody wrote
    sink = gaussian(query_heads, seed=6) if with_sink else None
    held = keys, values, torch.tensor(LENGTHS, dtype=torch.int32)
    _, *stored, constants, scaling, name = cache.dense_arguments()
    wanted = None if budgets is None else torch.tensor(budgets, dtype=torch.int32)
    return [query, *new, *stored, wanted, max(budgets or [0]), *held, sink, constants, scaling, name]


def check(given):
    """Output and window are those of two operators. Returns the output."""
    query, new_k, new_v, *stored, budgets, width, keys, values, lengths, sink, constants, scaling, name = (
        given
    )
    rest = constants, scaling, name
    if budgets is None:
        part = ops.dense_attend(query, *stored, *rest)
    else:
        part = ops.sparse_decode(query, *stored, budgets, width, *rest)
    copies = keys.clone(), values.clone()
    wanted = ops.window_attend(query, new_k, new_v, *copies, lengths, *part, sink, scaling)
    got = ops.step_attend(*given)
    assert got.dtype == query.dtype
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    at = TOLERANCE[query.dtype]
    torch.testing.assert_close(got.float(), wanted.float(), atol=at, rtol=at)
    for mine, other in zip((keys, values), copies, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
    return got


every_preset = pytest.mark.parametrize("preset", ["balanced", "paper"])


@every_preset
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("dim", "heads", "groups", "bits", "page", "with_sink"),
    [(64, 3, 3, 2, 128, False), (80, 2, 1, 3, 24, True), (96, 1, 5, 2, 8, True), (128, 2, 4, 2, 128, False),
     (256, 1, 16, 3, 40, False)],
)  # fmt: skip
@pytest.mark.parametrize("budgets", [None, [200, 41, 0]])
def test_a_step_is_its_operators(isa, preset, dtype, dim, heads, groups, bits, page, with_sink, budgets):
    shape = dim, heads, groups, bits, page, 1, dtype
    cache = make_cache([700, 41, 0], *shape, short=(1, 2), preset=preset)
    check(arguments(cache, with_sink, budgets))


@every_preset
@pytest.mark.parametrize("budgets", [None, [200, 41, 30]])
def test_a_step_is_near_the_reference(isa, preset, budgets, monkeypatch):
    cache = make_cache([700, 41, 90], 128, 2, 4, preset=preset)
    given = arguments(cache, True, budgets)
    got = ops.step_attend(*given)
    monkeypatch.setenv("SELFINDEX_CPU", "reference")
    wanted = reference.step_attend(*given)
    # Rounding decides what is selected at the end of a budget.
    assert (got - wanted).norm() < (1e-3 if budgets is None else 3e-2) * wanted.norm()


@every_preset
def test_pools_far_apart_and_constants_per_row(isa, preset):
    cache = make_cache([700, 41, 90], preset=preset)
    cache.constants = torch.cat([cache.constants * (1 + i) for i in range(3)])
    cache.index, cache.payload = pools(cache.fmt, cache.index, cache.payload, gap=48)
    for budgets in (None, [30, 20, 10]):
        check(arguments(cache, budgets=budgets))


@every_preset
def test_threads_do_not_change_the_result(isa, preset):
    cache = make_cache([1500, 41, 90], 64, 3, 3, preset=preset)
    for budgets in (None, [300, 20, 10]):
        given = arguments(cache, budgets=budgets)
        alone = ops.step_attend(*given)
        torch.set_num_threads(3)
        try:
            for _ in range(20):
                assert torch.equal(ops.step_attend(*given), alone)
        finally:
            torch.set_num_threads(1)


@every_preset
def test_numbers_that_are_none_are_not_hidden(isa, preset):
    for budgets in (None, [30, 20, 10]):
        given = arguments(make_cache([700, 41, 90], preset=preset), budgets=budgets)
        given[0][1] = torch.nan
        got = ops.step_attend(*given)
        assert got[1].isnan().all()
        assert torch.isfinite(got[[0, 2]]).all()


@every_preset
def test_places_that_do_not_exist_are_refused_before_anything_is_written(isa, preset):
    cache = make_cache([700, 41, 90], preset=preset)
    for budgets in (None, [30, 20, 10]):
        given = arguments(cache, budgets=budgets)
        before = given[9].clone()
        for index, value, message in ((5, len(cache.index), "outside the pool"), (11, ROOM, "no room")):
            wrong = [x.clone() if i in (5, 11) else x for i, x in enumerate(given)]
            wrong[index].view(-1)[0] = value
            with pytest.raises(IndexError, match=message):
                ops.step_attend(*wrong)
        torch.testing.assert_close(given[9], before, rtol=0, atol=0, equal_nan=True)
