"""What the sparse path attends to: the budget's best tokens and all full-precision ones, no others."""

import pytest
import torch
from dense_oracle import dense_attention
from pages import leave_coded_domain
from stores import fill, new_store, paper_config, random_tokens, small_config

from selfindex.attention.attend import attend
from selfindex.backends import ops
from selfindex.index.select import sum_of_softmax


def chosen_by_oracle(store, query, budgets, scaling=0.125):
    """Per row, KV head and query: encoded tokens with the best scores, counted within the row."""
    table, counts = store.table.tensors()
    heads, page = store.format.kv_heads, store.format.page_size
    if store.config.preset == "paper":
        mean = query.float().unflatten(1, (heads, -1)).mean(2)
        scores = ops.score(mean, store.pool.index, table, counts, store.constants, scaling, store.format.name)
    else:
        logits = ops.score(
            query, store.pool.index, table, counts, store.constants, scaling, store.format.name
        )
        scores = sum_of_softmax(logits, heads)
    chosen = []
    for b, budget in enumerate(budgets):
        # Short pages leave empty slots; tokens are counted without them.
        slots = [p * page + i for p, n in enumerate(store.table.rows[b].counts) for i in range(n)]
        row = scores[b][..., slots]
        chosen.append(
            [
                [set(sorted(range(len(slots)), key=lambda i: (-s[i], i))[:budget]) for s in head.tolist()]
                for head in row
            ]
        )
    return chosen


@pytest.mark.parametrize("preset", ["balanced", "paper"])
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("budget", [1, 7, 20])
def test_sparse_attention_is_dense_attention_over_the_selected_tokens(preset, new, budget):
    make = small_config if preset == "balanced" else paper_config
    store = new_store(make(budget=budget), batch=2)
    fill(store, 60)
    keys, values, query = random_tokens(store, new, seed=9)
    got, read = attend(store, query, keys, values, None, 0.125)
    assert read == [budget, budget]
    chosen = chosen_by_oracle(store, query, read)
    wanted = dense_attention(store, query, keys, values, chosen=chosen)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_budgets_and_lengths_per_row_with_a_short_page():
    store = new_store(small_config(budget=0.25), batch=3)
    keys, values, query = random_tokens(store, 80)
    valid = torch.ones(3, 80, dtype=torch.bool)
    valid[1, :30] = False
    store.append(keys, values, query, valid, 0.125)
    store.crop([80, 50, 31])  # the third row is cut within a page
    fill(store, 24)
    assert store.table.rows[2].counts[3] == 3
    keys, values, query = random_tokens(store, 2, seed=9)
    got, read = attend(store, query, keys, values, None, 0.125)
    assert read == [-(-(store.length(b) + 2) // 4) for b in range(3)]
    chosen = chosen_by_oracle(store, query, read)
    wanted = dense_attention(store, query, keys, values, chosen=chosen)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_long_chunk_attends_to_everything():
    store = new_store(small_config(budget=3, sparse_queries=4))
    fill(store, 60)
    keys, values, query = random_tokens(store, 5, seed=9)
    got, read = attend(store, query, keys, values, None, 0.125)
    assert read == [store.encoded(0)]
    torch.testing.assert_close(got, dense_attention(store, query, keys, values), atol=1e-5, rtol=1e-5)


def test_a_short_cache_attends_to_everything():
    store = new_store(small_config(budget=3, dense_below=48))
    fill(store, 60)
    assert store.encoded(0) == 48
    assert attend_one(store) == [48]
    fill(store, 8)
    assert attend_one(store) == [3]


def attend_one(store):
    keys, values, query = random_tokens(store, 1, seed=9)
    return attend(store, query, keys, values, None, 0.125)[1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"budget": 0.1}, 11),
        ({"budget": 0.1, "min_tokens": 30}, 30),
        ({"budget": 0.5}, 51),
        ({"budget": 1.0}, 88),
        ({"budget": 17, "min_tokens": 30}, 17),
        ({"budget": 5000}, 88),
    ],
    ids=str,
)
def test_budget_counts_the_tokens_cached_so_far(options, wanted):
    store = new_store(small_config(**options))
    fill(store, 100)
    assert store.encoded(0) == 88
    assert attend_one(store) == [wanted]


def test_encoded_keys_leave_the_coded_domain_with_the_balance():
    # The oracle's own inverse: q.k must be the same in both domains.
    store = new_store(small_config())
    fill(store, 40)
    fmt, query = store.format, random_tokens(store, 1, seed=9)[2][:, :2]
    from selfindex.codec import codec_for

    mapped = codec_for(fmt.name).map_query(query, store.constants)
    coded = torch.randn(1, 2, 5, 64)
    plain, _ = leave_coded_domain(fmt, coded, coded, store.constants)
    torch.testing.assert_close(
        mapped @ coded.transpose(-1, -2), query @ plain.transpose(-1, -2), atol=1e-4, rtol=1e-5
    )
