"""Long chunks over pages that are decoded to memory, as on a GPU, against dense attention over them."""

import pytest
import torch
from dense_oracle import check
from stores import CONFIGS, filled, paper_config, random_tokens, small_config, uneven_store

from selfindex.attention import attend as module
from selfindex.attention import decoded
from selfindex.attention.attend import attend
from selfindex.attention.parts import MOST_HELD


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Calls of `decode_pages`: rows and pages of each; chunks from 4 tokens on are long."""
    seen, decode = [], decoded.ops.decode_pages

    def counted(*arguments):
        seen.append(tuple(arguments[2].shape))
        return decode(*arguments)

    monkeypatch.setattr(decoded.ops, "decode_pages", counted)
    monkeypatch.setattr(module, "is_decoded", lambda store, query, scaling: query.shape[2] >= 12)
    return seen


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (1, 4), (3, 1)], ids=["gqa", "mqa", "mha"])
def test_rows_of_one_length_are_one_call(preset, dtype, heads, groups, calls):
    store = filled(CONFIGS[preset](budget=1.0), 60, batch=2, heads=heads, dtype=dtype)
    sink = torch.linspace(-2, 3, heads * groups)
    for logit in (None, sink):
        check(store, random_tokens(store, 20, groups, seed=9), sink_logit=logit)
    assert calls == [(2, store.table.pages)] * 2


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("pages", [1, 2, 4, 6, 100])
def test_a_bounded_number_of_pages_at_a_time(preset, pages, calls, monkeypatch):
    store = filled(CONFIGS[preset](budget=1.0), 99, batch=2)
    assert store.table.pages > MOST_HELD + 1
    monkeypatch.setattr(decoded, "MOST_SCRATCH", pages * 2 * (2 * 2 * 64 * 8 * 4))
    check(store, random_tokens(store, 20, seed=9))
    assert max(n for _, n in calls) <= pages
    assert sum(n for _, n in calls) == store.table.pages
    assert len(calls) == -(-store.table.pages // pages)


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_split_where_queries_are_few(batch, calls, monkeypatch):
    monkeypatch.setattr(decoded, "FEWEST_KEYS", 20)
    monkeypatch.setattr(decoded, "multiprocessors", lambda device: 16 * batch)
    store = filled(small_config(budget=1.0), 99, batch=batch)
    keys, values, query = random_tokens(store, 20, seed=9)
    assert store.encoded(0) == 80
    assert decoded.splits_for(query, 80) == 4  # of 20 tokens for each of 4 heads
    assert decoded.splits_for(query, 79) == 1
    assert decoded.splits_for(query.repeat(1, 1, 7, 1), 80) == 2  # of two tiles
    attended = []
    attend_plain = decoded.attend_plain
    monkeypatch.setattr(
        decoded, "attend_plain", lambda *a, **b: attended.append(a[1]) or attend_plain(*a, **b)
    )
    check(store, (keys, values, query))
    assert [x.shape[0] for x in attended] == [4 * batch]


def test_rows_of_different_length_and_padding(calls):
    store = uneven_store(small_config(budget=1.0))
    fresh = torch.ones(3, 15, dtype=torch.bool)
    fresh[0, 9:], fresh[1, :3] = False, False
    check(store, random_tokens(store, 15, seed=9), fresh, real=fresh)
    assert calls == [(1, 6), (1, 2)]  # the last row has none


def test_pages_that_are_not_full(calls):
    """The last one of a prompt in the paper preset, and one that was cut."""
    store = filled(paper_config(budget=1.0), 61, batch=2)
    assert store.encoded(0) % 8
    check(store, random_tokens(store, 20, seed=9))
    store = filled(small_config(budget=1.0), 61, batch=2)
    store.crop([25, 25])
    assert store.encoded(0) % 8
    check(store, random_tokens(store, 20, seed=9))
    assert calls


def test_offloaded_pages_are_staged(calls, monkeypatch):
    store = filled(small_config(budget=1.0, offloading=True), 99, batch=2)
    monkeypatch.setattr(decoded, "STAGED_PAGES", 6)
    check(store, random_tokens(store, 20, seed=9))
    assert [n for _, n in calls] == [3, 3, 3, 1]


def test_a_kernel_that_does_not_run_is_announced_once_and_replaced(calls, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no engine for this shape\nand more")

    store = filled(small_config(budget=1.0))
    monkeypatch.setattr(decoded, "attend_plain", fails)
    monkeypatch.setattr(decoded, "_refused", refused := set())
    with pytest.warns(RuntimeWarning, match="slower way for long chunks: no engine for this shape$"):
        check(store, random_tokens(store, 20, seed=9))
    assert len(refused) == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_errors_of_the_gpu_are_not_taken_for_a_missing_kernel(error, monkeypatch):
    def fails(*arguments, **options):
        raise error("out of order")

    store = filled(small_config(budget=1.0))
    monkeypatch.setattr(decoded, "attend_plain", fails)
    keys, values, query = random_tokens(store, 20, seed=9)
    with pytest.raises(error):
        attend(store, query, keys, values, None, 0.125)


@pytest.mark.parametrize("new", [9, 20])
def test_tensors_that_want_derivatives_are_served(new):
    """A call outside `torch.no_grad()`, of few and of many tokens."""
    store = filled(small_config(budget=1.0))
    keys, values, query = (x.requires_grad_() for x in random_tokens(store, new, seed=9))
    got, _ = attend(store, query, keys, values, None, 0.125)
    with torch.no_grad():
        assert torch.equal(attend(store, query, keys, values, None, 0.125)[0], got)
    (slope,) = torch.autograd.grad(got[:, :, -1].sum(), values)
    assert slope.any()
