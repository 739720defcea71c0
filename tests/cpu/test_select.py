"""The compiled selection on given scores is the reference's, ties included."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfindex.backends import reference
from selfindex.backends.cpu.operators import top_k


def check(scores, count):
    budget = torch.tensor([count], dtype=torch.int32)
    wanted = reference.select(scores.view(1, 1, 1, -1), budget, count).flatten()
    assert top_k(scores, count).tolist() == wanted[wanted >= 0].tolist()


@given(
    values=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1e-30, 1.0, 3.0]), min_size=1, max_size=200),
    share=st.floats(0, 1),
)
def test_ties_go_to_the_lower_slot(isa, values, share):
    check(torch.tensor(values), round(share * len(values)))


@given(
    values=st.lists(st.floats(width=32, min_value=-1.0000000331813535e32), min_size=1, max_size=300),
    share=st.floats(0, 1),
)
def test_any_numbers(isa, values, share):
    check(torch.tensor(values, dtype=torch.float32), round(share * len(values)))


@pytest.mark.parametrize("count", [1, 2, 127, 1000, 1250, 2500, 19999, 20000])
@pytest.mark.parametrize("kind", ["softmax", "normal", "rounded", "equal", "ascending"])
def test_many_scores(isa, count, kind):
    normal = torch.randn(20000)
    scores = {
        "softmax": (4 * normal).softmax(-1),
        "normal": normal,
        "rounded": (8 * normal).round(),
        "equal": torch.full((20000,), 0.25),
        "ascending": torch.arange(20000.0),
    }[kind]
    check(scores, count)
    # Slots without a token.
    scores[torch.randperm(20000)[: 20000 - count]] = -torch.inf
    check(scores, count)


def test_not_a_number_selects_no_more_than_asked_for(isa):
    scores = torch.full((100,), torch.nan)
    assert len(top_k(scores, 10)) <= 10
    scores[::2] = 1.0
    assert len(top_k(scores, 10)) <= 10
