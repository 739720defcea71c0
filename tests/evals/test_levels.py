"""What evals.levels simulates is the product's scoring, and its bounds, bytes and orders are right."""

import pytest
import torch

from evals.candidates import (
    PAGE,
    SINKS,
    case,
    first_pass,
    held_by,
    page_scores,
    partial_logits,
    read_by_channels,
    selection,
    skipped,
    upper_bounds,
)
from evals.levels import Found, needed

HEADS, GROUP, TOKENS, D = 2, 3, 1024, 64
LOUD = 3
"""A page whose keys all queries like."""


@pytest.fixture(scope="module")
def steps():
    generator = torch.Generator().manual_seed(0)
    liked = torch.randn(HEADS, 1, 1, D, generator=generator)
    query = torch.randn(HEADS, GROUP, TOKENS, D, generator=generator) + liked
    keys = torch.randn(HEADS, TOKENS, D, generator=generator)
    start = SINKS + LOUD * PAGE
    keys[:, start : start + PAGE] += 2 * liked[:, 0]
    return case(query.flatten(0, 1), keys, D**-0.5)


def test_all_groups_together_are_the_logits_of_one_level(steps):
    for longest in (False, True):
        logits, rest = partial_logits(steps, 1.0, longest)
        torch.testing.assert_close(logits, steps.logits, atol=1e-4, rtol=1e-4)
        assert not rest.any()


def test_a_part_of_the_groups_is_off_by_at_most_the_rest(steps):
    first, longest = (partial_logits(steps, 0.5, by_length) for by_length in (False, True))
    for logits, rest in (first, longest):
        assert ((logits - steps.logits).abs() <= rest + 1e-4).all()
        assert (logits - steps.logits).abs().amax() > 0.1
    # Chosen for the query heads of a group together.
    assert (longest[1].sum(1) < first[1].sum(1)).all()


def test_logits_estimate_those_of_the_model(steps):
    true = steps.queries @ steps.keys.mT[:, None]
    together = torch.stack((true.flatten(), steps.logits.flatten()))
    assert torch.corrcoef(together)[0, 1] > 0.75
    assert ((steps.mass.sum(-1) > 0) & (steps.mass.sum(-1) < GROUP + 1e-4)).all()


def test_every_estimate_opens_the_page_that_queries_like(steps):
    scores = page_scores(steps)
    assert set(first_pass(D)) < set(scores)
    for name, found in scores.items():
        assert (found.argmax(-1) == LOUD).float().mean() > 0.9, name


def test_no_bound_is_below_a_vote(steps):
    best = steps.votes.unflatten(-1, (-1, PAGE)).amax(-1)
    for name, bounds in upper_bounds(steps).items():
        votes = best if bounds.shape == best.shape else steps.votes
        assert (bounds >= votes * (1 - 1e-4)).all(), name
    assert skipped(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[2.5]]])) == 0.5


def test_pages_of_an_order_hold_their_content():
    order = torch.tensor([[[0.1, 0.4, 0.3]]])
    content = torch.tensor([[[5.0, 1.0, 4.0]]])
    held = held_by(order, content)
    assert held.tolist() == [[[1.0, 5.0, 10.0]]]
    assert [needed(held[0, 0] / 10, share) for share in (0.05, 0.1, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("longest", [False, True])
def test_bytes_of_two_passes_over_channels(longest):
    none = torch.zeros(1, 1, 2 * PAGE, dtype=torch.bool)
    half = PAGE * 8 / (PAGE * 17 + 140)  # of 16 bytes of codes, a scale; a page's mean and three numbers
    assert read_by_channels(none, 128, 0.5, longest) == pytest.approx((1 - half, 1 - half))
    assert read_by_channels(~none, 128, 0.5, longest) == pytest.approx((1, 1))
    one = none.clone()
    one[..., 0] = True  # takes 8 bytes of its own, but a sector of 4 tokens, or half a page for every group
    near = 64 if longest else 4
    expected = (1 - half + half / (2 * PAGE), 1 - half + half * near / (2 * PAGE))
    assert read_by_channels(one, 128, 0.5, longest) == pytest.approx(expected)


def test_a_summary_of_one_layer(steps):
    found = Found()
    found.add(steps, 64, 0)
    summary = found.summary()
    for row in summary["pages"].values():
        assert row["tokens"][0] <= row["tokens"][1] <= 1
        assert row["tokens"][1] >= summary["pages"]["oracle"]["tokens"][1]
    assert summary["pages"]["oracle"]["tokens"][1] <= summary["pages_with_any"] + 0.2
    whole = [row for row in summary["channels"] if row["part"] == 0.75 and row["factor"] == 8]
    assert all(row["tokens"] > 0.95 and row["bytes"] <= row["sectors"] <= 1 for row in whole)
    assert selection(steps.votes, 64).sum(-1).eq(64).all()
