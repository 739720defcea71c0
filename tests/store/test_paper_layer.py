"""The paper preset: the whole prompt is encoded at once, but for tokens each head keeps."""

import pytest
import torch
from pages import relative_error
from stores import decoded_pages, fill, new_store, paper_config, random_tokens

from selfindex import StateError
from selfindex.codec.paper import prompt_statistics
from selfindex.store.pinned import LONGEST_DRAFT


def prompt_of(store, tokens, seed=0):
    keys, values, query = random_tokens(store, tokens, seed=seed)
    store.append(keys, values, query, None, 0.125)
    return keys, values


@pytest.mark.parametrize("tokens", [5, 12, 13, 40, 41])
def test_prompt_is_encoded_but_for_the_pinned_tokens(tokens):
    store = new_store(paper_config())
    keys, values = prompt_of(store, tokens)
    assert (store.length(0), store.encoded(0), store.window.lengths[0]) == (tokens, tokens - 4, 4)
    for head in range(2):
        # Every token is either pinned, exactly, or encoded, in order.
        full = store.window.keys[0, head, :4]
        pinned = [(keys[0, head] == k).all(-1).nonzero().item() for k in full]
        assert pinned == sorted(pinned)
        assert torch.equal(store.window.values[0, head, :4], values[0, head, pinned])
        rest = [t for t in range(tokens) if t not in pinned]
        if tokens > 12:
            assert relative_error(decoded_pages(store, 0)[0][head], keys[0, head, rest]) < 0.45
            assert relative_error(decoded_pages(store, 0)[1][head], values[0, head, rest]) < 0.45


@pytest.mark.parametrize("tokens", [1, 3, 4])
def test_a_prompt_no_longer_than_the_pinned_tokens_stays_as_it_is(tokens):
    store = new_store(paper_config())
    keys, _ = prompt_of(store, tokens)
    assert (store.encoded(0), store.window.lengths[0]) == (0, tokens)
    assert torch.equal(store.window.keys[:, :, :tokens], keys)
    # The first page that has to be encoded later fixes the statistics.
    fill(store, *[1] * 12)
    assert store.encoded(0) == (tokens + 12 - 4) // 8 * 8
    assert torch.isfinite(decoded_pages(store, 0)[0]).all()


def test_statistics_are_those_of_the_prompt():
    store = new_store(paper_config())
    keys, _ = prompt_of(store, 40)
    constants = store.constants.clone()
    torch.testing.assert_close(constants[0, :, :64], keys[0].mean(1))
    fill(store, 30, *[1] * 20)
    assert torch.equal(store.constants, constants)


def test_rows_have_their_own_statistics():
    store = new_store(paper_config(), batch=2)
    keys, values, query = random_tokens(store, 40)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[1, :10] = False
    store.append(keys, values, query, valid, 0.125)
    assert [store.encoded(b) for b in range(2)] == [36, 26]
    torch.testing.assert_close(store.constants[1, :, :64], keys[1, :, 10:].mean(1))
    store.select_rows(torch.tensor([1, 1]))
    assert torch.equal(store.constants[0], store.constants[1])


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("tokens", [5, 40, 700])
def test_prompts_of_several_rows_are_stored_as_each_of_them_alone(tokens, drafts):
    together = new_store(paper_config(), batch=3)
    keys, values, query = random_tokens(together, tokens + drafts * LONGEST_DRAFT)
    keys[1] *= 3
    together.commit(together.plan(keys, values, query, None, 0.125, drafts=drafts))
    for b in range(3):
        alone = new_store(paper_config())
        own = keys[b : b + 1], values[b : b + 1], query[b : b + 1]
        alone.commit(alone.plan(*own, None, 0.125, drafts=drafts))
        assert torch.equal(together.constants[b], alone.constants[0])
        held, wanted = (store.table.rows[i] for store, i in ((together, b), (alone, 0)))
        assert held.counts == wanted.counts
        for pool, other in zip(
            together.pool.read(held.blocks, keys.device),
            alone.pool.read(wanted.blocks, keys.device),
            strict=True,
        ):
            assert torch.equal(pool, other)
        length = alone.window.lengths[0]
        assert together.window.lengths[b] == length
        assert torch.equal(together.window.keys[b, :, :length], alone.window.keys[0, :, :length])
        assert torch.equal(together.window.values[b, :, :length], alone.window.values[0, :, :length])


def test_crop_inside_the_prompt_is_refused_and_changes_nothing():
    store = new_store(paper_config())
    prompt_of(store, 40)
    fill(store, 5)
    with pytest.raises(StateError, match="inside its prompt"):
        store.crop([39])
    assert store.length(0) == 45
    store.crop([42])
    assert store.length(0) == 42
    store.crop([40])
    assert store.length(0) == 40


def test_crop_to_nothing_starts_a_new_prompt():
    store = new_store(paper_config())
    prompt_of(store, 40)
    store.crop([0])
    keys, _ = prompt_of(store, 20, seed=5)
    assert store.encoded(0) == 16
    torch.testing.assert_close(store.constants[0, :, :64], keys[0].mean(1))


def test_a_short_prompt_after_a_crop_to_nothing_takes_its_own_statistics():
    store, fresh = new_store(paper_config()), new_store(paper_config())
    prompt_of(store, 40)
    store.crop([0])
    for s in (store, fresh):
        prompt_of(s, 3, seed=5)
        fill(s, 20, seed=6)
    assert torch.equal(store.constants, fresh.constants)


@pytest.mark.parametrize("before", [1, 4, 5, 40])
def test_what_may_be_drafts_is_not_part_of_the_prompt(before):
    store, tokens = new_store(paper_config()), before + LONGEST_DRAFT
    keys, values, query = random_tokens(store, tokens)
    keys[:, :, before:] *= 9  # loud drafts: nothing of the prompt is to know of them
    store.commit(store.plan(keys, values, query, None, 0.125, drafts=True))
    encoded = max(0, before - 4)
    assert (store.length(0), store.encoded(0)) == (tokens, encoded)
    assert torch.equal(
        store.window.keys[:, :, 4 if encoded else 0 : tokens - encoded],
        keys[:, :, before if encoded else 0 :],
    )
    if encoded:
        assert torch.equal(store.constants[0], prompt_statistics(keys[0, :, :before]))
        for head in range(2):
            pinned = [(keys[0, head] == k).all(-1).nonzero().item() for k in store.window.keys[0, head, :4]]
            assert max(pinned) < before
            rest = [t for t in range(before) if t not in pinned]
            assert relative_error(decoded_pages(store, 0)[0][head], keys[0, head, rest]) < 0.45
        with pytest.raises(StateError, match="activate_past_recording"):
            store.crop([before - 1])
    for keep in (tokens - 3, before):
        store.crop([keep])
        assert (store.length(0), store.encoded(0)) == (keep, encoded)
    constants = None if store.constants is None else store.constants.clone()
    fill(store, *[1] * 20)
    assert store.length(0) == before + 20
    assert store.encoded(0) == encoded + (before - encoded + 20 - 4) // 8 * 8
    assert constants is None or torch.equal(store.constants, constants)
