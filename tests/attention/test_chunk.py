"""Sparse attention of long chunks to encoded pages, against the plain operators over what these decode to."""

import backends
import pytest
import torch
from dense_oracle import TOLERANCE, check, dense_attention
from stores import CONFIGS, fill, filled, held_tokens, new_store, random_tokens, small_config, uneven_store

from selfindex.attention import chunk as module
from selfindex.attention import decoded
from selfindex.attention.attend import attend
from selfindex.attention.chunk import FEWEST_QUERIES, is_sparse_chunk
from selfindex.attention.prompt import EXACT
from selfindex.backends import ops, reference
from selfindex.backends.operators.select_blocks import BLOCK
from selfindex.backends.partial import attend_exact

ALL = {"budget": 1.0, "prefill": "sparse", "prefill_mass": 1.0}
FEW = ALL | {"prefill_density": 0.3}
NEW = FEWEST_QUERIES + 61


@pytest.fixture
def selections(monkeypatch):
    """Queries and keys of every selection."""
    seen, own = [], ops.select_blocks

    def select(query, keys, *rest):
        seen.append((query.shape[2], keys.shape[2]))
        return own(query, keys, *rest)

    monkeypatch.setattr(ops, "select_blocks", select)
    return seen


def plain_sparse(store, query, keys, values, b=0, scaling=0.125):
    """What row b of a chunk should give, from tokens as the test decodes them, float32 [Hq, T, d]."""
    config, held = store.config, held_tokens(store, b)
    k, v = (torch.cat((x, new[b].float()), 1)[None] for x, new in zip(held, (keys, values), strict=True))
    # What is decoded for the kernels is in the queries' dtype.
    k, v, q = (x.to(query.dtype).float() for x in (k, v, query[b : b + 1]))
    tokens, new = k.shape[2], q.shape[2]
    first = (tokens - EXACT) // BLOCK * BLOCK
    early, late = q.tensor_split([first - tokens + new], 2)
    own = k[:, :, :first], v[:, :, :first]
    selection = reference.select_blocks(early, own[0], scaling, config.prefill_mass, config.prefill_density)
    output = reference.block_attend(early, *own, *selection, scaling)[0]
    visible = torch.ones(late.shape[2], tokens, dtype=torch.bool).tril(first)
    return torch.cat((output, attend_exact(late, k, v, visible, scaling)[0]), 2)[0]


@backends.on_cpu
@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(2, 2, 64), (1, 4, 96), (3, 1, 128), (1, 7, 64)])
def test_all_blocks_are_dense_attention(preset, dtype, heads, groups, dim, selections):
    store = new_store(CONFIGS[preset](**ALL), heads=heads, dim=dim, dtype=dtype)
    fill(store, 301, groups=groups)
    sink = torch.linspace(-2, 3, heads * groups)
    for logit in (None, sink):
        assert check(store, random_tokens(store, NEW, groups, seed=9), sink_logit=logit) == [store.encoded(0)]
    first = (301 + NEW - EXACT) // BLOCK * BLOCK
    assert selections == [(first - 301, first)] * 2


@backends.on_cpu
@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("before", "new"), [(301, NEW), (700, 3 * FEWEST_QUERIES), (40, FEWEST_QUERIES + 1)])
def test_few_blocks_are_those_of_the_plain_operators(preset, dtype, before, new, selections):
    store = filled(CONFIGS[preset](**FEW), before, dtype=dtype)
    keys, values, query = random_tokens(store, new, seed=9)
    got = attend(store, query, keys, values, None, 0.125)[0]
    tolerance = TOLERANCE[dtype]
    wanted = plain_sparse(store, query, keys, values)
    torch.testing.assert_close(got[0].float(), wanted, atol=tolerance, rtol=tolerance)
    assert len(selections) == 1


def test_the_last_queries_read_everything_and_others_do_not():
    store = filled(small_config(**FEW), 700)
    keys, values, query = random_tokens(store, NEW, seed=9)
    got = attend(store, query, keys, values, None, 0.125)[0]
    wanted = dense_attention(store, query, keys, values)
    torch.testing.assert_close(got[:, :, -EXACT:], wanted[:, :, -EXACT:], atol=1e-5, rtol=1e-5)
    error = (got - wanted)[:, :, : -EXACT - BLOCK].abs().amax((0, 1, 3))
    assert (error > 1e-4).all()
    again = attend(store, query, keys, values, None, 0.125)[0]
    assert torch.equal(got, again)


def test_the_last_queries_are_split_where_they_are_few(monkeypatch):
    store = filled(small_config(**FEW), 700)
    keys, values, query = random_tokens(store, NEW, seed=9)
    wanted, calls, own = attend(store, query, keys, values, None, 0.125)[0], [], decoded.attend_plain

    def seen(query, *rest, **more):
        calls.append(query.shape[0])
        return own(query, *rest, **more)

    monkeypatch.setattr(decoded, "attend_plain", seen)
    monkeypatch.setattr(decoded, "FEWEST_KEYS", 20)
    monkeypatch.setattr(decoded, "multiprocessors", lambda device: 64)
    got = attend(store, query, keys, values, None, 0.125)[0]
    assert calls == [4]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


@backends.on_cpu
def test_rows_are_rows_alone(selections):
    """Rows of different length behind and in padding; one is too short for selecting, one is padding."""
    store = uneven_store(small_config(**FEW))
    keys, values, query = random_tokens(store, NEW, seed=9)
    valid = torch.ones(3, NEW, dtype=torch.bool)
    valid[0, -20:], valid[1, :100], valid[2, ::3] = False, False, False
    got = attend(store, query, keys, values, valid, 0.125)[0]
    assert not got.transpose(1, 2)[~valid].any()
    dense = dense_attention(store, query, keys, values, valid)
    for b in range(3):
        real = valid[b]
        own = [x[:, :, real] for x in (query, keys, values)]
        wanted = plain_sparse(store, *own, b) if real.sum() > FEWEST_QUERIES else dense[b][:, real]
        torch.testing.assert_close(got[b][:, real], wanted, atol=1e-5, rtol=1e-5)
    assert len(selections) == 1  # the others are too short
    assert not attend(store, query, keys, values, valid & False, 0.125)[0].any()


def test_rows_without_padding_select_for_themselves(selections):
    store = uneven_store(small_config(**FEW))
    keys, values, query = random_tokens(store, NEW, seed=9)
    got = attend(store, query, keys, values, None, 0.125)[0]
    for b in range(3):
        wanted = plain_sparse(store, query, keys, values, b)
        torch.testing.assert_close(got[b], wanted, atol=1e-5, rtol=1e-5)
    assert len(selections) == 3


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("offloading", [False, True])
def test_scratch_is_bounded(preset, offloading, monkeypatch):
    store = filled(CONFIGS[preset](**FEW, offloading=offloading), 333, batch=2, heads=3)
    tokens = random_tokens(store, NEW, seed=9)
    sink = torch.linspace(-2, 3, 6)
    sizes, own = [], decoded.ops.decode_pages

    def seen(*arguments):
        sizes.append((arguments[2].shape[1], arguments[5].shape[0]))
        return own(*arguments)

    monkeypatch.setattr(decoded.ops, "decode_pages", seen)
    call = store, tokens[2], *tokens[:2], None, 0.125, sink
    wanted, pages = attend(*call)[0], store.table.pages
    assert {h for _, h in sizes} == {3}
    sizes.clear()
    monkeypatch.setattr(module, "STAGED_PAGES", 7)
    for heads in (2, 1):  # 2 at a time, of 3; and less than one
        monkeypatch.setattr(module, "MOST_SCRATCH", (heads - 1) * 2 * 2 * (333 + NEW) * 64 * 4)
        monkeypatch.setattr(decoded, "MOST_SCRATCH", 10 * 2 * 3 * 64 * 8 * 4)
        sizes.clear()
        got = attend(*call)[0]
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)
        assert max(n for n, _ in sizes) <= (7 if offloading else 10)
        assert sum(n for n, _ in sizes) == 2 * pages * (2 if heads == 2 else 3)


@pytest.mark.parametrize(
    ("options", "before", "new"),
    [
        ({"prefill": "exact"}, 300, NEW),
        ({"dense_below": 300 + NEW}, 300, NEW),
        ({}, 300, FEWEST_QUERIES),
        ({"sparse_queries": NEW, "budget": 0.1}, 300, NEW),
    ],
)
def test_other_chunks_are_as_before(options, before, new, selections):
    config = small_config(**(FEW | options))
    store = filled(config, before)
    keys, values, query = random_tokens(store, new, seed=9)
    attend(store, query, keys, values, None, 0.125)
    assert not selections


def test_what_is_long_enough():
    config = small_config(**(FEW | {"dense_below": 2000}))
    assert is_sparse_chunk(config, 2001, FEWEST_QUERIES + 1)
    assert not is_sparse_chunk(config, 2000, FEWEST_QUERIES + 1)
    assert not is_sparse_chunk(config, 2001, FEWEST_QUERIES)


def test_behind_full_precision_tokens_only(selections):
    """A long document after a short greeting, of which nothing is encoded yet."""
    store = filled(small_config(**FEW), 9)
    assert not store.encoded(0)
    keys, values, query = random_tokens(store, NEW, seed=9)
    got = attend(store, query, keys, values, None, 0.125)[0]
    wanted = plain_sparse(store, query, keys, values)
    torch.testing.assert_close(got[0], wanted, atol=1e-5, rtol=1e-5)
    assert len(selections) == 1
