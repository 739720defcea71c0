"""Compiled `dense_attend` against the reference."""

import pytest
import torch
from encoded_cache import make_cache
from hypothesis import given
from hypothesis import strategies as st
from pages import relative_error

from selfindex.backends import ops, reference
from selfindex.backends.cpu import operators
from selfindex.backends.cpu.operators import dense_attend


def check(cache, error=2e-4):
    output, lse = dense_attend(*cache.dense_arguments())
    wanted, wanted_lse = reference.dense_attend(*cache.dense_arguments())
    assert relative_error(output, wanted) < error
    torch.testing.assert_close(lse, wanted_lse, atol=5e-4, rtol=5e-5)


every_preset = pytest.mark.parametrize("preset", ["balanced", "paper"])


@every_preset
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(
    ("heads", "groups", "bits", "page", "queries"),
    [(2, 3, 2, 128, 1), (1, 16, 3, 8, 2), (2, 1, 3, 40, 1), (1, 2, 2, 128, 20)],
)
def test_dense_agrees_with_the_reference(isa, preset, dim, heads, groups, bits, page, queries):
    shape = dim, heads, groups, bits, page, queries
    check(make_cache([1000, 128, 1], *shape, short=(2,), preset=preset))


@given(
    rows=st.lists(st.integers(0, 600), min_size=1, max_size=4),
    page=st.sampled_from([8, 40, 128]),
    queries=st.integers(1, 5),
    short=st.lists(st.integers(0, 4), max_size=2),
    preset=st.sampled_from(["balanced", "paper"]),
)
def test_ragged_rows(rows, page, queries, short, preset, monkeypatch_module):
    check(make_cache(rows if any(rows) else [5], page=page, queries=queries, short=short, preset=preset))


@pytest.fixture
def monkeypatch_module(monkeypatch, request):
    request.getfixturevalue("backend")
    monkeypatch.delenv("SELFINDEX_CPU")


@every_preset
def test_selecting_everything_is_dense_attention(isa, preset):
    cache = make_cache([1000, 128, 1], dim=96, short=(2,), preset=preset)
    output, lse, _ = cache.decode(cache.tokens)
    wanted = dense_attend(*cache.dense_arguments())
    torch.testing.assert_close(output, wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, wanted[1], atol=1e-5, rtol=1e-5)


@every_preset
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("groups", "bits", "dtype"), [(2, 3, torch.float16), (1, 2, torch.bfloat16)])
def test_many_queries_agree_with_the_reference(isa, monkeypatch, preset, dim, groups, bits, dtype):
    monkeypatch.setattr(operators, "FEW_ROWS", 10)
    monkeypatch.setattr(operators, "DENSE_CHUNK", 150)
    shape = dim, 2, groups, bits, 40, 11, dtype
    check(make_cache([300, 0, 1, 150], *shape, short=(2,), preset=preset), error=1e-5)


@every_preset
def test_both_ways_agree_where_they_meet(isa, monkeypatch, preset):
    cache = make_cache([700, 90], groups=2, queries=20, preset=preset)
    few = ops.dense_attend(*cache.dense_arguments())
    monkeypatch.setattr(operators, "FEW_ROWS", 39)
    many = ops.dense_attend(*cache.dense_arguments())
    assert not torch.equal(few[0], many[0]), "the other way ran"
    assert relative_error(few[0], many[0]) < 2e-4


@every_preset
def test_logits_far_apart(isa, preset):
    cache = make_cache([400], preset=preset)
    cache.query *= 40
    # Logits of a thousand, with 15 bits of the query.
    check(cache, error=1e-2)
