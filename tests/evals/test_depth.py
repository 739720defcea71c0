"""Layers of different designs, and a question that reads everything."""

from dataclasses import replace

import pytest
import torch

from evals.budgets import bytes_stored
from evals.depth import designs, thirds
from evals.designs import DEFAULT
from evals.endtoend import Simulated
from evals.sparse import Prefix

HEADS, GROUP, N, T, D, SCALING = 2, 3, 300, 12, 32, 0.2


@pytest.fixture
def given():
    """A prefix that decodes to what it is, and the queries, keys and values of a continuation."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads, tokens):
        return torch.randn(heads, tokens, D, generator=generator)

    keys, values = draw(HEADS, N), draw(HEADS, N)
    exact = draw(HEADS, 8), draw(HEADS, 8)
    prefix = Prefix(keys, keys, values, keys, values, *exact, None, None, N + 8)
    return prefix, (draw(HEADS * GROUP, T)[None], draw(HEADS, T)[None], draw(HEADS, T)[None])


def test_a_question_reads_everything_and_its_answer_selects(given):
    prefix, new = given
    every, none, some = (Simulated(prefix, DEFAULT, question) for question in (T, 0, 5))
    outputs = [simulated.attend(*new, SCALING) for simulated in (every, none, some)]
    torch.testing.assert_close(outputs[2][:, :5], outputs[0][:, :5])
    torch.testing.assert_close(outputs[2][:, 5:], outputs[1][:, 5:])
    assert not torch.equal(outputs[0][:, 5:], outputs[1][:, 5:])
    assert every.read.tolist() == [1.0] * T
    assert some.read.tolist() == pytest.approx([1.0] * 5 + [round(0.05 * (N + 8)) / N] * (T - 5))


def test_what_reads_everything_attends_to_it(given):
    """Against PyTorch's attention over the same keys, causal among the new ones."""
    prefix, (query, keys, values) = given
    got = Simulated(prefix, DEFAULT, T).attend(query, keys, values, SCALING)
    held = [torch.cat(x, 1)[None] for x in ((prefix.exact_k, prefix.k_hat), (prefix.exact_v, prefix.v_hat))]
    whole = [torch.cat((old, new), 2) for old, new in zip(held, (keys, values), strict=True)]
    seen = torch.ones(T, N + 8 + T, dtype=torch.bool).tril(N + 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, *whole, attn_mask=seen, scale=SCALING, enable_gqa=True
    )
    torch.testing.assert_close(got, wanted.transpose(1, 2))


def test_layers_in_thirds():
    assert thirds(6) == [0, 0, 1, 1, 2, 2]
    assert [thirds(28).count(third) for third in range(3)] == [10, 9, 9]
    assert all(len(design) == 3 for design in designs().values())


def test_a_bit_of_a_channel_is_an_eighth_of_a_byte():
    plain = bytes_stored(DEFAULT, 128)
    for name in ("key", "value"):
        spec = getattr(DEFAULT, name)
        assert bytes_stored(replace(DEFAULT, **{name: replace(spec, bits=spec.bits + 1)}), 128) == plain + 16
