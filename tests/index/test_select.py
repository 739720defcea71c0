import torch
from hypothesis import given
from hypothesis import strategies as st

from selfindex.index.select import SHARPNESS, sum_of_softmax, top_k


def oracle(scores, budget):
    """Slots of the best scores, equal ones from the left, ascending."""
    slots = [s for s, score in enumerate(scores) if score != float("-inf")]
    return sorted(sorted(slots, key=lambda s: (-scores[s], s))[:budget])


@st.composite
def cases(draw):
    """Scores with many ties, rows of different length, a budget per row, and a width."""
    batch, heads, new = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    slots = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randint(
        0, draw(st.integers(1, 30)), (batch, heads, new, slots), generator=generator
    ).float()
    lengths = [draw(st.integers(0, slots)) for _ in range(batch)]
    holes = draw(st.booleans())
    for b, length in enumerate(lengths):
        # Empty slots are at the end, or anywhere (short pages in the middle).
        empty = torch.randperm(slots, generator=generator)[length:] if holes else slice(length, None)
        scores[b, :, :, empty] = -torch.inf
    budgets = [draw(st.integers(0, length)) for length in lengths]
    width = max(budgets) + draw(st.integers(0, 2))
    return scores, budgets, width


@given(cases())
def test_selection_equals_a_sorted_oracle(case):
    scores, budgets, width = case
    got = top_k(scores, torch.tensor(budgets, dtype=torch.int32), width)
    assert got.shape == (*scores.shape[:3], width)
    assert got.dtype == torch.int32
    for b, budget in enumerate(budgets):
        for row, score in zip(got[b].flatten(0, 1).tolist(), scores[b].flatten(0, 1).tolist(), strict=True):
            assert row[budget:] == [-1] * (width - budget)
            assert row[:budget] == oracle(score, budget)
            assert len(set(row[:budget])) == budget


def test_ties_go_to_the_lower_slot():
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]).view(1, 1, 1, 5)
    assert top_k(scores, torch.tensor([3]), 3).tolist() == [[[[0, 1, 3]]]]


def test_nothing_to_select():
    assert top_k(torch.zeros(1, 1, 1, 0), torch.tensor([0]), 2).tolist() == [[[[-1, -1]]]]
    assert top_k(torch.zeros(2, 1, 1, 4), torch.tensor([0, 0]), 0).shape == (2, 1, 1, 0)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_sum_of_softmax_adds_up_the_votes_of_the_query_group(heads, groups, seed):
    logits = 3 * torch.randn(2, heads * groups, 2, 9, generator=torch.Generator().manual_seed(seed))
    logits[0, :, :, 6:] = -torch.inf
    got = sum_of_softmax(logits, heads)
    assert got.shape == (2, heads, 2, 9)
    for head in range(heads):
        wanted = logits[:, head * groups : (head + 1) * groups].mul(SHARPNESS).softmax(-1).sum(1)
        real = logits[:, head * groups] > -torch.inf
        torch.testing.assert_close(got[:, head][real], wanted[real])
        assert (got[:, head][~real] == -torch.inf).all()


def test_a_row_without_tokens_has_no_mass():
    logits = torch.zeros(2, 2, 1, 4)
    logits[1] = -torch.inf
    got = sum_of_softmax(logits, 1)
    assert not got.isnan().any()
    assert (got[1] == -torch.inf).all()
