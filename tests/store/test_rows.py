"""Every row has constants of its own, measured from its own tokens: it is encoded as if it were alone."""

import backends
import pytest
import torch
from backends import scaled
from pages import gaussian
from stores import decoded_pages, fill, new_store, small_config

from selfindex.attention.attend import attend

LENGTHS = (60, 37, 12, 20, 59, 44, 28, 3)
STEPS = 30


@pytest.fixture(params=["balanced", "paper"])
def preset(request):
    return request.param


def config_of(preset, **options):
    return small_config(preset=preset, **({"recent": 0} if preset == "paper" else {}), **options)


def tokens_of(row, new, loud=True):
    """(keys, values, query) [1, H, n, d] of a row's own; rows have other loud channels."""
    keys, values = (gaussian(1, 2, new, 64, seed=100 * row + i) for i in (1, 2))
    query = gaussian(1, 4, new, 64, seed=100 * row + 3)
    scale = torch.ones(64)
    scale[[(7 * row + 3) % 32, (7 * row + 3) % 32 + 32]] = 6.0 if loud else 1.0
    return keys * scale, values, query / scale


def on_device(*tensors):
    return [x.to(backends.current.device) for x in tensors]


def pages_of(store, row):
    """Index and payload bytes of a row's pages, on the host."""
    return [x.cpu() for x in store.pool.read(store.table.rows[row].blocks, store.pool.index.device)]


def batch_of(lengths, left):
    """Keys, values and queries of all rows, padded, and which are real."""
    width, rows = max(lengths), []
    valid = torch.zeros(len(lengths), width, dtype=torch.bool)
    for b, n in enumerate(lengths):
        at = slice(width - n, width) if left else slice(0, n)
        valid[b, at] = True
        padded = [torch.full((1, x.shape[1], width, 64), 50.0) for x in tokens_of(b, 1)]
        for whole, own in zip(padded, tokens_of(b, n), strict=True):
            whole[:, :, at] = own
        rows.append(padded)
    return [torch.cat(x) for x in zip(*rows, strict=True)], valid


@backends.every
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("offloading", [False, True])
def test_a_row_of_a_padded_batch_is_encoded_as_it_is_alone(backend, preset, left, offloading):
    lengths = [scaled(n) for n in LENGTHS]
    config = config_of(preset, offloading=offloading)
    together = new_store(config, len(lengths))
    (keys, values, query), valid = batch_of(lengths, left)
    together.append(*on_device(keys, values, query, valid), 0.125)
    alone = []
    for b, n in enumerate(lengths):
        alone.append(new_store(config))
        alone[-1].append(*on_device(*tokens_of(b, n)), None, 0.125)
    steps = scaled(STEPS)
    for i in range(steps):  # rows that had no page get their first, one after the other
        new = [tokens_of(1000 * b + i, 1, loud=False) for b in range(len(lengths))]
        together.append(*on_device(*(torch.cat(x) for x in zip(*new, strict=True))), None, 0.125)
        for store, own in zip(alone, new, strict=True):
            store.append(*on_device(*own), None, 0.125)
    for b, store in enumerate(alone):
        assert store.length(0) == together.length(b) == lengths[b] + steps
        assert store.table.rows[0].counts == together.table.rows[b].counts != []
        assert torch.equal(together.constants[b], store.constants[0])
        for one, other in zip(pages_of(together, b), pages_of(store, 0), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(together.window.held()[0][b, :, : store.window.width], store.window.held()[0][0])
    assert not torch.equal(together.constants[0], together.constants[1])
    backend.check_ran("encode" if offloading else "encode_into")


@backends.every
def test_a_row_of_equal_ones_is_encoded_and_read_as_it_is_alone(backend, preset):
    n = scaled(60)
    together = new_store(config_of(preset), 3)
    rows = [tokens_of(b, n) for b in range(3)]
    together.append(*on_device(*(torch.cat(x) for x in zip(*rows, strict=True))), None, 0.125)
    query, new, values = on_device(gaussian(3, 4, 1, 64), gaussian(3, 2, 1, 64), gaussian(3, 2, 1, 64))
    together.config = config_of(preset, budget=9)
    output, _ = attend(together, query, new, values, None, 0.125)
    for b in range(3):
        store = new_store(config_of(preset))
        store.append(*on_device(*rows[b]), None, 0.125)
        store.config = config_of(preset, budget=9)
        torch.testing.assert_close(together.constants[b], store.constants[0])
        for one, other in zip(decoded_pages(together, b), decoded_pages(store, 0), strict=True):
            torch.testing.assert_close(one, other)
        own = (x[b : b + 1] for x in (query, new, values))
        wanted, _ = attend(store, *own, None, 0.125)
        torch.testing.assert_close(output[b : b + 1], wanted)


def uneven(preset="balanced"):
    """Rows of 40, 25 and 3 tokens, of which the last has nothing encoded."""
    store = new_store(config_of(preset), 3)
    (keys, values, query), valid = batch_of((40, 25, 3), left=True)
    store.append(keys, values, query, valid, 0.125)
    return store


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 0, 1], [0, 1, 2], [2, 1], [0, 0, 1, 1, 2, 2]])
def test_constants_follow_their_rows(preset, order):
    store = uneven(preset)
    before = [decoded_pages(store, b) for b in range(3)]
    constants, seen = store.constants.clone(), store.statistics.queries_seen
    places = store.constants.data_ptr(), store.statistics.query_square.data_ptr()
    store.select_rows(torch.tensor(order))
    assert torch.equal(store.constants, constants[order])
    assert store.statistics.queries_seen == tuple(seen[i] for i in order)
    for i, old in enumerate(order):
        for one, other in zip(decoded_pages(store, i), before[old], strict=True):
            assert torch.equal(one, other)
    if len(order) == 3:  # where a captured graph reads them
        assert places == (store.constants.data_ptr(), store.statistics.query_square.data_ptr())


def test_constants_that_are_fixed_later_come_where_the_others_are(preset):
    store = uneven(preset)
    first, there = store.constants.clone(), store.constants.data_ptr()
    fork = store.copied(share=True)
    fill(store, *[1] * 20)
    assert store.statistics.has_constants == (True, True, True)
    assert store.constants.data_ptr() == there
    assert torch.equal(store.constants[:2], first[:2])
    assert not torch.equal(store.constants[2], first[2])
    assert torch.equal(fork.constants, first)
    assert fork.statistics.has_constants == (True, True, False)


def test_a_row_that_starts_anew_measures_anew(preset):
    store = uneven(preset)
    store.crop([40, 0, 3])
    assert store.statistics.has_constants == (True, False, False)
    assert store.statistics.queries_seen[1] == 0
    assert not store.statistics.query_square[1].any()
    first = store.constants[0].clone()
    (keys, values, query), _ = batch_of((24, 24, 24), left=True)
    valid = torch.tensor([[False], [True], [False]]).expand(3, 24)
    store.append(keys, values, query, valid, 0.125)
    fresh = new_store(config_of(preset))
    fresh.append(*(x[1:2] for x in (keys, values, query)), None, 0.125)
    assert torch.equal(store.constants[1], fresh.constants[0])
    assert torch.equal(store.constants[0], first)


def test_a_profile_serves_all_rows():
    balance = torch.linspace(0.5, 2, 128).view(2, 64)
    store = new_store(small_config(), 3, balance=balance)
    (keys, values, query), valid = batch_of((40, 25, 3), left=True)
    store.append(keys, values, query, valid, 0.125)
    store.select_rows(torch.tensor([1, 0, 1, 2]))
    store.crop([0, 40, 20, 3])
    fill(store, *[1] * 20)
    assert torch.equal(store.constants, balance[None])
    assert store.unobserved == [0] * 4
    assert not store.statistics.query_square.any()


def test_rows_of_their_own_take_what_memory_says():
    before = new_store(small_config(), 3, balance=torch.ones(2, 64))
    fill(before, 40)
    own = new_store(small_config(), 3)
    fill(own, 40)
    assert own.memory().statistics - before.memory().statistics == 2 * own.constants[0].nbytes
