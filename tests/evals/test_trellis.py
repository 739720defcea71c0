"""Simulated choices that are not in the default: levels by a trellis, tokens that are drawn."""

import itertools

import pytest
import torch

from evals.sparse import draw
from evals.trellis import BITS, fitted, paths, trellis_levels


@pytest.mark.parametrize("half", [False, True])
def test_no_path_is_nearer(half):
    table, x = fitted(4, half), torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    x = x.abs() if half else x
    got = paths(x, table)
    # Every window is the one before, shifted, with two new bits; the first channel sees zeros before it.
    assert (got[:, 0] < 1 << BITS).all()
    assert torch.equal(got[:, 1:] >> BITS, got[:, :-1] % 4)
    every = torch.tensor(list(itertools.product(range(1 << BITS), repeat=5)))
    before = torch.cat([torch.zeros(len(every), 1, dtype=torch.long), every[:, :-1]], 1)
    least = (x[:, None] - table[before * 4 + every]).square().sum(-1).amin(1)
    torch.testing.assert_close((x - table[got]).square().sum(1), least)


@pytest.mark.parametrize(("half", "each_alone"), [(False, 0.1175), (True, 0.0345)])
def test_errors_of_a_gaussian_fall_with_the_states(half, each_alone):
    x = torch.randn(400, 128, generator=torch.Generator().manual_seed(2))
    x = x.abs() if half else x
    errors = [(trellis_levels(x, states, half) - x).square().mean().item() for states in (4, 8)]
    assert each_alone > errors[0] > errors[1] > each_alone / 2
    assert errors[1] < 0.8 * each_alone


def test_what_is_drawn_stands_for_everything():
    torch.manual_seed(0)
    score, value = torch.rand(200).square(), torch.rand(200)
    taken, weight = draw(score.expand(4000, 200), 40)
    assert (taken.sum(-1) == 40).all()
    mean = (taken * weight.exp() * score * value).sum(-1).mean()
    everything, best = (score * value).sum(), (score * value)[score.topk(40).indices].sum()
    assert abs(mean - everything) < 0.04 * everything
    assert best < 0.8 * everything
    assert draw(score, 200)[0].all()
