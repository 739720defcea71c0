"""Attention over a filled store, against dense attention over what it decodes to."""

import pytest
import torch
from dense_oracle import TOLERANCE, check, dense_attention
from pages import HEAD_DIMS, gaussian
from stores import CONFIGS, fill, filled, new_store, random_tokens, small_config, uneven_store

from selfindex.attention import attend as module
from selfindex.attention.attend import attend


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (1, 4), (3, 1)], ids=["gqa", "mqa", "mha"])
def test_full_budget_is_dense_attention_over_the_decoded_cache(preset, dim, dtype, heads, groups):
    store = filled(CONFIGS[preset](budget=1.0), 40, heads=heads, dim=dim, dtype=dtype)
    assert store.encoded(0) > 20
    read = check(store, random_tokens(store, 1, groups, seed=9), scaling=dim**-0.5)
    assert read == [store.encoded(0)]


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("new", [1, 3, 8, 9, 20])
def test_a_budget_of_all_but_nothing_goes_the_sparse_way_and_agrees(preset, new, monkeypatch):
    # Rows of different length make the sparse operator run although every row may read all it has.
    store = filled(CONFIGS[preset](budget=1.0), 60, batch=2)
    store.crop([60, 50] if preset == "balanced" else [60, 60])
    dense = attend(store, *reversed_tokens(store, new), None, 0.125)[0]
    monkeypatch.setattr(module, "_dense_part", sparse_with_everything)
    sparse = attend(store, *reversed_tokens(store, new), None, 0.125)[0]
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)


def reversed_tokens(store, new):
    keys, values, query = random_tokens(store, new, seed=9)
    return query, keys, values


def sparse_with_everything(store, query, scaling):
    everything = [store.encoded(b) for b in range(store.batch)]
    return module._sparse_part(store, query, everything, scaling)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("new", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("budget", [1.0, 5])
def test_new_tokens_are_causal_among_themselves(preset, new, budget):
    store = filled(CONFIGS[preset](budget=budget))
    keys, values, query = random_tokens(store, new, seed=9)
    whole, _ = attend(store, query, keys, values, None, 0.125)
    for t in {0, new // 2, new - 1}:
        # What comes later does not matter. Its number may: it decides between sparse and dense.
        changed = [x.clone() for x in (query, keys, values)]
        for x in changed:
            x[:, :, t + 1 :] = 7.0
        again, _ = attend(store, *changed, None, 0.125)
        torch.testing.assert_close(again[:, :, t], whole[:, :, t], atol=1e-5, rtol=1e-5)
    if budget == 1.0:
        check(store, (keys, values, query))


@pytest.mark.parametrize("preset", CONFIGS)
def test_learned_sinks_take_probability(preset):
    store = filled(CONFIGS[preset](budget=1.0))
    tokens = random_tokens(store, 3, seed=9)
    sink = torch.tensor([-2.0, 0.0, 3.0, 9.0])
    check(store, tokens, sink_logit=sink)
    keys, values, query = tokens
    with_sink = attend(store, query, keys, values, None, 0.125, sink)[0]
    without = attend(store, query, keys, values, None, 0.125)[0]
    assert with_sink[:, 3].abs().max() < 0.1 * without[:, 3].abs().max()


def test_nothing_stored_is_attention_among_the_new_tokens():
    store = new_store(small_config())
    check(store, random_tokens(store, 5))


@pytest.mark.parametrize("tokens", [1, 5, 19])
def test_nothing_encoded_is_attention_over_the_raw_tokens(tokens):
    store = filled(small_config(), tokens)
    assert not store.encoded(0)
    assert check(store, random_tokens(store, 2, seed=9)) == [0]


@pytest.mark.parametrize("new", [1, 4, 12])
def test_rows_of_different_length_and_padding_among_the_new(new):
    store = uneven_store(small_config(budget=1.0))
    fresh = torch.ones(3, new, dtype=torch.bool)
    fresh[0, new // 2 + 1 :] = False  # right padding in one row
    fresh[2, : new // 3] = False  # left padding in another
    tokens = list(random_tokens(store, new, seed=9))
    check(store, tokens, fresh, real=fresh)


def test_padding_among_the_new_may_hold_anything():
    store = filled(small_config(budget=1.0), batch=2)
    keys, values, query = random_tokens(store, 4, seed=9)
    valid = torch.tensor([[True, True, True, True], [True, True, False, False]])
    one, _ = attend(store, query, keys, values, valid, 0.125)
    for x in (keys, values):
        x[1, :, 2:] = 1e4
    other, _ = attend(store, query, keys, values, valid, 0.125)
    assert torch.equal(one[1, :, :2], other[1, :, :2])
    assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("budget", [1.0, 3])
def test_memory_that_holds_no_token_is_not_read(preset, budget):
    store = new_store(CONFIGS[preset](budget=budget), batch=2)
    keys, values, query = random_tokens(store, 45)
    valid = torch.ones(2, 45, dtype=torch.bool)
    valid[1, :19] = False
    store.append(keys, values, query, valid, 0.125)
    fill(store, 3)
    wanted = attend(store, *reversed_tokens(store, 2), None, 0.125)[0]
    for row, length in enumerate(store.window.lengths):
        store.window.keys[row, :, length:] = store.window.values[row, :, length:] = torch.nan
    unused = set(range(store.pool.capacity)) - {b for row in store.table.rows for b in row.blocks}
    for plane in (store.pool.index, store.pool.payload):
        plane[list(unused)] = 255
    got = attend(store, *reversed_tokens(store, 2), None, 0.125)[0]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("new", [3, 12])
def test_attending_changes_nothing_that_is_held(new):
    store = filled(small_config(budget=5))
    store.reserve(0, 60)
    before = store.memory(), store.length(0), store.pool.index.clone(), store.window.held()[0].clone()
    attend(store, *reversed_tokens(store, new), None, 0.125)
    assert (store.memory(), store.length(0)) == before[:2]
    assert torch.equal(store.pool.index, before[2])
    assert torch.equal(store.window.held()[0], before[3])


def test_values_keep_their_own_scale():
    store = new_store(small_config(budget=1.0))
    keys, values, query = random_tokens(store, 60)
    store.append(keys, 100 * values, query, None, 0.125)
    keys, values, query = random_tokens(store, 1, seed=9)
    got, _ = attend(store, query, keys, 100 * values, None, 0.125)
    torch.testing.assert_close(got, dense_attention(store, query, keys, 100 * values), atol=1e-3, rtol=1e-4)


def test_output_is_close_to_exact_attention():
    # A query that looks for one token finds it, and its value.
    store = new_store(small_config(budget=6))
    keys, values, query = random_tokens(store, 100)
    store.append(keys, values, query, None, 0.125)
    wanted = 37
    query = 4 * keys[:, :, wanted : wanted + 1].repeat_interleave(2, 1)
    got, read = attend(store, query, gaussian(1, 2, 1, 64), gaussian(1, 2, 1, 64), None, 0.125)
    assert read == [6]
    for head in range(4):
        error = (got[0, head, 0] - values[0, head // 2, wanted]).norm()
        assert error < 0.5 * values[0, head // 2, wanted].norm()
