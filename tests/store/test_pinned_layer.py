"""Prompts of "balanced" some of whose tokens each head pins, because the last queries look at them."""

import pytest
import torch
from pages import relative_error
from stores import decoded_pages, fill, held_tokens, new_store, random_tokens, small_config

from selfindex import StateError
from selfindex.codec.votes import choose_pinned
from selfindex.store.pinned import LONGEST_DRAFT, NEIGHBOURS, OBSERVED_QUERIES

SINKS, RECENT, PINNED, PAGE = 4, 8, 5, 8
LEAST = SINKS + PINNED + RECENT + PAGE


def pinning(**options):
    return small_config(pinned_tokens=PINNED, **options)


def places(store, keys, row=0, own=0):
    """Which tokens of keys [B, H, n, d] are in the front of a row's heads."""
    front = store.window.keys[row, :, : SINKS + PINNED]
    return [
        [(keys[own, head] == k).all(-1).nonzero().item() for k in front[head]]
        for head in range(keys.shape[1])
    ]


@pytest.mark.parametrize("tokens", [LEAST, LEAST + 1, 60, 333])
def test_heads_keep_what_the_last_queries_look_at(tokens):
    store = new_store(pinning())
    keys, values, query = random_tokens(store, tokens)
    store.append(keys, values, query, None, 0.125)
    asking = query[:, :, -OBSERVED_QUERIES:].unflatten(1, (2, -1))
    wanted = choose_pinned(keys, asking, PINNED, 0.125, SINKS, tokens - RECENT, NEIGHBOURS)[0]
    pages = (tokens - SINKS - PINNED - RECENT) // PAGE
    assert (store.length(0), store.encoded(0)) == (tokens, pages * PAGE)
    for head, front in enumerate(places(store, keys)):
        assert front == [*range(SINKS), *wanted[head].tolist()]
        assert torch.equal(store.window.values[0, head, : SINKS + PINNED], values[0, head, front])
        # All others are encoded, or are the last ones, in order.
        rest = [t for t in range(tokens) if t not in front]
        for got, given, most in zip(held_tokens(store, 0), (keys, values), (0.3, 0.4), strict=True):
            assert relative_error(got[head, SINKS + PINNED :], given[0, head, rest]) < most
        recent = rest[pages * PAGE :]
        length = store.window.lengths[0]
        assert torch.equal(store.window.keys[0, head, SINKS + PINNED : length], keys[0, head, recent])


def test_they_are_of_use():
    """With a needle that the last queries look at, attention to everything stored is nearer to the truth."""
    errors = []
    for config in (small_config(), pinning()):
        store = new_store(config)
        keys, values, query = random_tokens(store, 200)
        keys[:, :, 90] = keys[0, 0, 0]
        query[:, :, -32:] += 2 * keys[0, 0, 0]
        store.append(keys, values, query, None, 0.125)
        got = held_tokens(store, 0)
        asked = query[0, :, -1:].unflatten(0, (2, -1))
        outputs = [
            (asked @ k[:, None].mT * 0.125).softmax(-1) @ v[:, None] for k, v in (got, (keys[0], values[0]))
        ]
        errors.append(relative_error(*outputs))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("drafts", [False, True])
def test_rows_are_stored_as_each_of_them_alone(padded, drafts):
    together, tokens = new_store(pinning(), batch=3), 100 + drafts * LONGEST_DRAFT
    keys, values, query = random_tokens(together, tokens)
    valid, starts = None, (0, 0, 0)
    if padded:
        starts = (0, 37, 100 - LEAST + 1)  # the last one is too short
        valid = torch.arange(tokens) >= torch.tensor(starts)[:, None]
        keys[~valid[:, None].expand(keys.shape[:3])] = torch.nan
    together.commit(together.plan(keys, values, query, valid, 0.125, drafts=drafts))
    for b, start in enumerate(starts):
        alone = new_store(pinning())
        own = [x[b : b + 1, :, start:] for x in (keys, values, query)]
        alone.commit(alone.plan(*own, None, 0.125, drafts=drafts))
        assert together.statistics.prompt_tokens[b] == alone.statistics.prompt_tokens[0]
        assert bool(alone.statistics.prompt_tokens[0]) == (100 - start >= LEAST)
        for got, wanted in zip(held_tokens(together, b), held_tokens(alone, 0), strict=True):
            torch.testing.assert_close(got, wanted)
        length = alone.window.lengths[0]
        assert together.window.lengths[b] == length
        assert torch.equal(together.window.keys[b, :, :length], alone.window.keys[0, :, :length])


@pytest.mark.parametrize("padded", [False, True])
def test_a_row_that_begins_beside_others_pins_as_alone(padded):
    store, alone = new_store(pinning(), batch=2), new_store(pinning())
    keys, values, query = random_tokens(store, 50)
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[1] = False
    store.append(keys, values, query, valid, 0.125)
    assert store.statistics.prompt_tokens == (50, 0)
    front = places(store, keys)
    later, values, query = random_tokens(store, 60, seed=1)
    valid = torch.ones(2, 60, dtype=torch.bool) if padded else None
    store.append(later, values, query, valid, 0.125)
    alone.append(later[1:], values[1:], query[1:], None, 0.125)
    assert store.statistics.prompt_tokens == (50, 60)
    assert places(store, keys) == front
    assert places(store, later, 1, 1) == places(alone, later[1:])
    for got, wanted in zip(held_tokens(store, 1), held_tokens(alone, 0), strict=True):
        torch.testing.assert_close(got, wanted)


def test_other_rows_keep_as_many_from_their_start():
    short, steps = new_store(pinning()), new_store(pinning())
    keys, _ = fill(short, LEAST - 1, 30, 1)
    assert places(short, keys) == [list(range(SINKS + PINNED))] * 2
    keys, _ = fill(steps, *[1] * 50)
    assert places(steps, keys) == [list(range(SINKS + PINNED))] * 2
    assert steps.encoded(0) == (50 - SINKS - PINNED - RECENT) // PAGE * PAGE
    for store in (short, steps):
        assert store.statistics.prompt_tokens == (0,)
        store.crop([30])
        assert store.length(0) == 30


def test_later_chunks_leave_the_front_as_it_is():
    store = new_store(pinning())
    keys, _, query = random_tokens(store, 60)
    store.append(keys, keys, query, None, 0.125)
    front = places(store, keys)
    later, _ = fill(store, 40, *[1] * 20, seed=7)
    assert places(store, torch.cat((keys, later), 2)) == front
    assert store.encoded(0) == (120 - SINKS - PINNED - RECENT) // PAGE * PAGE
    tail = store.window.lengths[0] - SINKS - PINNED
    assert torch.equal(store.window.keys[:, :, SINKS + PINNED : SINKS + PINNED + tail], later[:, :, -tail:])


def test_crop_inside_the_prompt_is_refused_and_changes_nothing():
    store = new_store(pinning())
    fill(store, 60, 5)
    before = [x.clone() for x in decoded_pages(store, 0)]
    with pytest.raises(StateError, match="inside its prompt of 60"):
        store.crop([59])
    assert store.length(0) == 65
    for keep in (62, 60):
        store.crop([keep])
        assert store.length(0) == keep
    for got, wanted in zip(decoded_pages(store, 0), before, strict=True):
        assert torch.equal(got, wanted[:, : got.shape[1]])
    store.crop([0])
    keys, _ = fill(store, 70, seed=9)
    assert store.statistics.prompt_tokens == (70,)
    assert all(front[:SINKS] == list(range(SINKS)) for front in places(store, keys))


@pytest.mark.parametrize("before", [LEAST - 1, LEAST, 90])
def test_what_may_be_drafts_is_not_part_of_the_prompt(before):
    store, tokens = new_store(pinning()), before + LONGEST_DRAFT
    keys, values, query = random_tokens(store, tokens)
    query[:, :, before:] *= 9  # loud drafts: the prompt is not to know of them
    store.commit(store.plan(keys, values, query, None, 0.125, drafts=True))
    alone = new_store(pinning())
    alone.append(*(x[:, :, :before] for x in (keys, values, query)), None, 0.125)
    assert places(store, keys) == places(alone, keys)
    assert store.statistics.prompt_tokens == ((before,) if before >= LEAST else (0,))
    store.crop([before + 3])
    assert store.length(0) == before + 3


def test_the_last_queries_are_enough():
    """The evaluation records some of a long prompt's queries, these among them."""
    whole, some = new_store(pinning()), new_store(pinning())
    keys, values, query = random_tokens(whole, 90)
    whole.append(keys, values, query, None, 0.125)
    kept = torch.cat((query[:, :, :20], query[:, :, -40:]), 2)
    some.append(keys, values, kept, None, 0.125)
    assert places(some, keys) == places(whole, keys)
