"""The arithmetic of the paper preset's scores on a GPU, as prepare_paper.cuh and score_paper.cuh do it."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfindex.backends.cuda import loader

PREPARE = (loader.SOURCES / "prepare_paper.cuh").read_text()
SETS = [int(x, 16) for x in re.search(r"sets = (.*);", PREPARE)[1].replace(":", " ").split() if x[:2] == "0x"]


def parity(x):
    return x.bit_count() & 1


def features(x):
    """Feature words of a word of sign bits, as in score_paper.cuh."""
    before = (x << 1 & 0xEEEEEEEE) | (x >> 3 & 0x11111111)
    second = (x << 2 & 0xCCCCCCCC) | (x >> 2 & 0x33333333)
    return x, x ^ before, x ^ before ^ second, x ^ second ^ ((before ^ x << 3) & 0x88888888)


def key_of(scores, least, span):
    """Selection keys of scores from `least` to `least + span`, in single precision, as in score_paper.cuh."""
    first, last = 16 + 1, 2048 * 16 - 2
    slope = np.float32(last - first) / np.float32(max(span, 1))
    start = np.float32(2**23) + np.float32(first) - np.float32(least) * slope
    sums = (scores.astype(np.float64) * slope + start).astype(np.float32)
    return (sums.view(np.uint32) & 0x7FFF).astype(int)


@given(st.integers(0, 2**32 - 1))
def test_every_set_of_bits_has_its_parity_at_one_place(word):
    found = {}
    for feature, sets in zip(features(word), SETS, strict=True):
        for group in range(8):
            for bit in range(4):
                members = sets >> 4 * bit & 15
                if members:
                    code = word >> 4 * group & 15
                    assert feature >> (4 * group + bit) & 1 == parity(code & members)
                    found.setdefault(members, []).append(group)
    assert sorted(found) == list(range(1, 16))
    assert all(groups == list(range(8)) for groups in found.values())


def test_weights_of_the_sets_give_the_table_up_to_a_constant():
    table = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = torch.tensor([[1 - 2 * parity(code & s) for code in range(16)] for s in range(16)]).double()
    weights = -(signs @ table) / 8
    sums = torch.tensor(
        [sum(float(weights[s]) * parity(code & s) for s in range(1, 16)) for code in range(16)]
    )
    constant = table - sums
    torch.testing.assert_close(constant, constant[:1].expand(16).clone(), atol=1e-6, rtol=0)


@given(st.integers(0, 480 * 32767), st.data())
def test_keys_grow_with_scores_and_leave_out_bin_0(span, data):
    least = data.draw(st.integers(-span, 0))
    scores = sorted(data.draw(st.lists(st.integers(least, least + span), min_size=1, max_size=20)))
    scores = np.array([least, *scores, least + span], dtype=np.float32)
    keys = key_of(scores, least, span)
    assert 16 <= keys.min() <= keys.max() <= 32767
    assert (np.diff(keys) >= 0).all()


@pytest.mark.parametrize("loud", [1, 20])
@pytest.mark.parametrize(("tokens", "budget"), [(5000, 400), (60_000, 3000)])
def test_keys_select_what_exact_scores_select(loud, tokens, budget):
    generator = torch.Generator().manual_seed(tokens)
    tables = torch.randn(32, 16, generator=generator, dtype=torch.float64)
    tables[:2] *= loud
    codes = torch.randint(16, (tokens, 32), generator=generator)
    exact = sum(tables[g][codes[:, g]] for g in range(32))
    parities = torch.tensor([[parity(code & s) for code in range(16)] for s in range(16)]).double()
    weights = (2 * parities - 1) @ tables.T / 8
    weights[0] = 0
    weights = (weights * (32767 / weights.abs().max())).round()
    scores = sum((weights[:, g] @ parities)[codes[:, g]] for g in range(32))
    least, span = float(weights.clamp(max=0).sum()), float(weights.abs().sum())
    found = np.argsort(-key_of(scores.numpy().astype(np.float32), least, span), kind="stable")[:budget]
    wanted = set(exact.topk(budget).indices.tolist())
    assert len(wanted & set(found.tolist())) >= 0.998 * budget
