"""Rules that spread a budget give what they say, and the average they were asked for."""

from dataclasses import replace

import pytest
import torch

from evals.budgets import bytes_read, shares, spread
from evals.capture import TAIL, LayerRecord, Record
from evals.designs import DEFAULT
from evals.sparse import attend, encode

HEADS, GROUP, N, T, D = 2, 2, 600, 32, 64
BUDGET = replace(DEFAULT, budget=0.1)


@pytest.fixture
def record():
    """Three layers of random tensors, whose queries are the sharper the later the layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads, tokens, scale=1.0):
        return scale * torch.randn(heads, tokens, D, generator=generator)

    layers = {}
    for i in range(3):
        q = draw(HEADS * GROUP, T + TAIL, 1 + 2 * i)
        k, v, new_k, new_v = (draw(HEADS, n) for n in (N, N, T, T))
        square = {w: q.square().mean(1) for w in (0, 256, 512, 1024)}
        layers[i] = LayerRecord(k, v, new_k, new_v, q[:, TAIL:], q[:, :TAIL], square, D**-0.5)
    return Record("random", torch.zeros(N + T, dtype=torch.long), N, torch.zeros(T, 8), layers)


def prefixes(record, variant, other=None):
    balance = torch.ones(HEADS, D)
    plain = {i: encode(layer, variant, balance) for i, layer in record.layers.items()}
    return spread(record, plain, variant, other)


def read(record, variant, other=None):
    """Share of the encoded tokens that the tail queries select, by layer and head."""
    found = []
    for i, prefix in prefixes(record, variant, other).items():
        layer = record.layers[i]
        got = attend(layer.q_tail[:, -T:], prefix, layer.new_k, layer.new_v, layer.scaling, variant)
        found.append(got.selected.float().mean((1, 2)))
    return torch.stack(found)


def test_uniform(record):
    assert read(record, BUDGET) == pytest.approx(0.1 * N / (N - 80), rel=0.01)


@pytest.mark.parametrize("rule", ["heads", "layers"])
def test_static_budgets_keep_the_average(record, rule):
    found = read(record, replace(BUDGET, spread=rule))
    assert found.mean() == pytest.approx(0.1, rel=0.15)
    assert found.std() > 0.02  # and they differ
    equal = (found[:, 0] == found[:, 1]).all()
    assert equal == (rule == "layers")


def test_budgets_of_another_text(record):
    other = {i: torch.full((HEADS,), share) for i, share in enumerate((0.05, 0.1, 0.2))}
    found = read(record, replace(BUDGET, spread="other heads"), other)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.05, 0.1, 0.2]), atol=0.002, rtol=0)


def test_threshold_gives_queries_what_they_need(record):
    found = prefixes(record, replace(BUDGET, spread="threshold"))
    assert len({prefix.threshold for prefix in found.values()}) == 1
    mean = torch.stack(list(shares(record, found, BUDGET).values())).mean()
    assert mean == pytest.approx(0.1, rel=0.02)


def test_dense_layers_read_everything(record):
    found = read(record, replace(BUDGET, dense_layers=1))
    assert (found[0] == 1).all()
    assert (found[1:] < 0.2).all()


def test_bytes():
    # 8 bytes of signs, a scale, a mean a page; 5 % of 16 + 16 bytes and a scale.
    assert bytes_read(DEFAULT, 64, 0.05) == pytest.approx(9 + 76 / 128 + 0.05 * 33)
    assert bytes_read(replace(DEFAULT, rerank=2), 64, 0.05) == pytest.approx(9 + 76 / 128 + 0.05 * 49)
