"""Which tokens of a prompt its last queries look at."""

import pytest
import torch
from pages import gaussian

from selfindex.codec import votes
from selfindex.codec.votes import choose_pinned


def test_pinned_tokens_are_those_the_last_queries_attend_to():
    keys = 0.1 * gaussian(2, 50, 64)
    queries = gaussian(2, 3, 4, 64, seed=1)
    keys[0, 7], keys[1, 30] = queries[0].sum((0, 1)), queries[1].sum((0, 1))
    pinned = choose_pinned(keys[None], queries[None], 5, 0.125)[0]
    assert pinned.shape == (2, 5)
    assert 7 in pinned[0]
    assert 30 in pinned[1]
    assert (pinned.diff() > 0).all()


@pytest.mark.parametrize("heads_at_a_time", [1, 2, 3, 7])
def test_pinned_tokens_do_not_depend_on_how_much_is_counted_at_once(monkeypatch, heads_at_a_time):
    keys, queries = gaussian(3, 2, 50, 64), gaussian(3, 2, 3, 4, 64, seed=1)
    alone = [choose_pinned(k[None], q[None], 5, 0.125) for k, q in zip(keys, queries, strict=True)]
    monkeypatch.setattr(votes, "_VOTES_BYTES", heads_at_a_time * 4 * 3 * 4 * 50)
    assert torch.equal(choose_pinned(keys, queries, 5, 0.125), torch.cat(alone))


@pytest.mark.parametrize("tokens", [4, 9])
def test_votes_are_causal(tokens):
    # The last token is loud, but only the last query may see it.
    keys, queries = torch.zeros(1, tokens, 64), torch.ones(1, 1, 4, 64)
    keys[0, -1] = 100
    keys[0, 0] = 1
    pinned = choose_pinned(keys[None], queries[None], 1, 1.0)
    votes = torch.zeros(tokens)
    for i in range(4):
        seen = tokens - 4 + i + 1
        votes[:seen] += (keys[0, :seen] @ queries[0, 0, i]).softmax(-1)
    assert pinned.item() == votes.argmax().item()
    assert pinned.item() == 0


def test_neighbours_count_with_the_best_of_them():
    keys, queries = torch.zeros(1, 40, 64), torch.ones(1, 1, 2, 64)
    keys[0, 20] = 1
    for neighbours, wanted in ((1, [20]), (3, [19, 20, 21]), (7, list(range(17, 24)))):
        found = choose_pinned(keys[None], queries[None], len(wanted), 1.0, neighbours=neighbours)
        assert found[0, 0].tolist() == wanted


def test_the_one_with_the_votes_comes_before_its_neighbours():
    keys, queries = torch.zeros(1, 40, 64), torch.ones(1, 1, 2, 64)
    keys[0, 20], keys[0, 30] = 1, 0.99
    found = choose_pinned(keys[None], queries[None], 1, 1.0, neighbours=7)
    assert found.item() == 20


def test_only_tokens_of_a_range_are_chosen():
    keys, queries = 0.1 * gaussian(2, 50, 64), gaussian(2, 3, 4, 64, seed=1)
    inside = choose_pinned(keys[None], queries[None], 20, 0.125, first=15, end=35)[0]
    assert torch.equal(inside, torch.arange(15, 35).expand(2, -1))
    some = choose_pinned(keys[None], queries[None], 5, 0.125, first=15, end=35)[0]
    every = choose_pinned(keys[None], queries[None], 50, 0.125)[0]
    assert every.shape == (2, 50)
    assert all(set(own) <= set(range(15, 35)) for own in some.tolist())
