import pytest
import torch
from pages import relative_error
from stores import decoded_pages, fill, held_tokens, new_store, random_tokens, small_config

from selfindex import InputError, SelfIndexConfig
from selfindex.store.state import export, restore


def test_nothing_is_encoded_until_a_page_has_left_the_window():
    store = new_store(small_config())
    limit = 4 + 8 + 8
    fill(store, limit - 1)
    assert (store.encoded(0), store.length(0)) == (0, limit - 1)
    fill(store, 1)
    assert (store.encoded(0), store.length(0)) == (8, limit)


@pytest.mark.parametrize("sinks", [0, 4, 16])
@pytest.mark.parametrize("recent", [0, 8, 11])
@pytest.mark.parametrize("chunks", [(60,), (1,) * 60, (7,) * 8 + (4,), (33, 1, 1, 25)], ids=str)
def test_order_of_tokens_and_bytes_do_not_depend_on_how_they_arrive(sinks, recent, chunks):
    config = small_config(sinks=sinks, recent=recent)
    balance = torch.linspace(0.5, 2, 128).view(2, 64)
    whole, parts = new_store(config, balance=balance), new_store(config, balance=balance)
    keys, values, query = random_tokens(whole, 60)
    whole.append(keys, values, query, None, 0.125)
    start = 0
    for new in chunks:
        at = slice(start, start + new)
        parts.append(keys[:, :, at], values[:, :, at], query[:, :, at], None, 0.125)
        start += new
    assert whole.encoded(0) == (60 - sinks - recent) // 8 * 8
    for store in (whole, parts):
        assert store.length(0) == 60
        got_keys, got_values = held_tokens(store, 0)
        assert relative_error(got_keys, keys[0]) < 0.3
        assert relative_error(got_values, values[0]) < 0.4
    for one, other in zip(held_tokens(whole, 0), held_tokens(parts, 0), strict=True):
        assert torch.equal(one, other)
    for plane in ("index", "payload"):
        rows = [getattr(s.pool, plane)[s.table.rows[0].blocks] for s in (whole, parts)]
        assert torch.equal(*rows)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("chunks", [(60,), (3, 50, 1, 1, 30), (30, 30), (2, 2, 100)], ids=str)
def test_rows_of_equal_length_are_stored_as_each_alone(sinks, chunks):
    balance = torch.linspace(0.5, 2, 128).view(2, 64)
    together = new_store(small_config(sinks=sinks), batch=3, balance=balance)
    alone = [new_store(small_config(sinks=sinks), balance=balance) for _ in range(3)]
    for i, new in enumerate(chunks):
        tokens = random_tokens(together, new, seed=i)
        together.append(*tokens, None, 0.125)
        for b, store in enumerate(alone):
            store.append(*(x[b : b + 1] for x in tokens), None, 0.125)
    for b, store in enumerate(alone):
        assert together.table.rows[b].counts == store.table.rows[0].counts
        for one, other in zip(held_tokens(together, b), held_tokens(store, 0), strict=True):
            assert torch.equal(one, other)
        for plane in ("index", "payload"):
            rows = ((together, b), (store, 0))
            one, other = (getattr(x.pool, plane)[x.table.rows[row].blocks] for x, row in rows)
            assert torch.equal(one, other)


def test_encoded_pages_never_change():
    store = new_store(small_config())
    fill(store, 50)
    blocks = list(store.table.rows[0].blocks)
    before = store.pool.index[blocks].clone(), store.pool.payload[blocks].clone()
    constants = store.constants.clone()
    for _ in range(40):
        fill(store, 1)
    fill(store, 30)
    assert store.table.rows[0].blocks[: len(blocks)] == blocks
    assert torch.equal(store.pool.index[blocks], before[0])
    assert torch.equal(store.pool.payload[blocks], before[1])
    assert torch.equal(store.constants, constants)


def test_rows_differ_in_length():
    store = new_store(small_config(), batch=3)
    keys, values, query = random_tokens(store, 40)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, :15] = False
    valid[2, :] = False
    store.append(keys, values, query, valid, 0.125)
    assert [store.length(b) for b in range(3)] == [40, 25, 0]
    assert [store.encoded(b) for b in range(3)] == [24, 8, 0]
    assert relative_error(held_tokens(store, 1)[0], keys[1, :, 15:]) < 0.3


def test_appending_nothing_changes_nothing():
    store = new_store(small_config())
    fill(store, 30, 0)
    assert store.length(0) == 30


def test_balance_is_measured_on_the_first_page_and_its_queries():
    store = new_store(small_config(sinks=0, recent=0), heads=1)
    keys, values, query = random_tokens(store, 8)
    keys[..., [3, 35]] *= 10
    query[..., [5, 37]] *= 10
    store.append(keys, values, query, None, 0.125)
    balance = store.constants[0, 0]
    assert balance[3] < 0.6 * balance.median()
    assert balance[5] > 1.6 * balance.median()
    # Queries after the first page do not count.
    other = new_store(small_config(sinks=0, recent=0), heads=1)
    later = [x.clone() for x in (keys, values, query)]
    later[2][..., [9, 41]] *= 100
    other.append(
        *(torch.cat(pair, 2) for pair in zip((keys, values, query), later, strict=True)), None, 0.125
    )
    torch.testing.assert_close(other.constants, store.constants)


def test_balance_of_a_profile_is_used_as_it_is():
    balance = torch.linspace(0.5, 2, 128).view(2, 64)
    store = new_store(small_config(), balance=balance)
    fill(store, 40)
    assert torch.equal(store.constants, balance[None])


def test_balance_of_another_model_is_refused():
    with pytest.raises(InputError, match="another model"):
        new_store(small_config(), balance=torch.ones(3, 64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_is_not_stored(bad, which):
    store = new_store(small_config())
    fill(store, 25)
    before = [x.clone() for x in held_tokens(store, 0)]
    tokens = list(random_tokens(store, 20))
    tokens[which][0, 0, 3, 5] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        store.append(*tokens, None, 0.125)
    assert store.length(0) == 25
    for one, other in zip(held_tokens(store, 0), before, strict=True):
        assert torch.equal(one, other)


def test_crop_into_the_pages_leaves_short_pages_that_still_decode():
    store = new_store(small_config())
    keys, values = fill(store, 60)
    store.crop([4 + 8 + 3])
    assert store.table.rows[0].counts == [8, 3]
    got_keys, got_values = decoded_pages(store, 0)
    assert relative_error(got_keys, keys[0, :, 4:15]) < 0.3
    assert relative_error(got_values, values[0, :, 4:15]) < 0.4
    # What follows goes behind the cut, page by page.
    fill(store, 30)
    assert store.length(0) == 45
    assert store.table.rows[0].counts == [8, 3, 8, 8]


@pytest.mark.parametrize("sinks", [0, 4])
def test_crop_to_any_length_keeps_the_first_tokens(sinks):
    for keep in range(41):
        store = new_store(small_config(sinks=sinks), heads=1)
        keys, values = fill(store, 40)
        store.crop([keep])
        assert store.length(0) == keep
        got_keys, got_values = held_tokens(store, 0)
        for got, wanted in ((got_keys, keys[0, :, :keep]), (got_values, values[0, :, :keep])):
            error = (got - wanted).norm(dim=-1)
            assert (error < 0.75 * wanted.norm(dim=-1)).all()
            assert torch.equal(got[:, : min(sinks, keep)], wanted[:, : min(sinks, keep)])


def test_selected_rows_share_pages_until_they_part():
    store = new_store(small_config(), batch=2)
    fill(store, 40)
    used = store.pool.used
    store.select_rows(torch.tensor([1, 1, 0, 1]))
    assert store.pool.used == used
    assert store.batch == 4
    for a, b in zip(held_tokens(store, 0), held_tokens(store, 3), strict=True):
        assert torch.equal(a, b)
    fill(store, 8)
    assert store.pool.used > used
    assert store.table.rows[0].blocks[-1] != store.table.rows[1].blocks[-1]


def test_what_a_crop_leaves_can_be_written_and_read():
    store = new_store(SelfIndexConfig(page_size=8, recent=8, dense_below=0))  # the preset chooses the sinks
    fill(store, 60)
    store.crop([3 + store.config.sinks])
    assert [type(n) for n in store.window.lengths] == [int]
    again = restore(store.config, *export(store))
    assert again.length(0) == store.length(0) == 3 + store.config.sinks
