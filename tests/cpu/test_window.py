"""Compiled `window_attend` against the reference."""

import pytest
import torch
from pages import gaussian

from selfindex.backends import ops, reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Two units in the last place of the output's dtype, whose numbers are below 2 here."""


def arguments(dim, heads, groups, room, lengths, dtype, with_sink=False):
    batch = len(lengths)
    # Heads of a projection's output lie side by side, as in a model.
    query = gaussian(batch, 1, heads * groups, dim, seed=1).to(dtype).transpose(1, 2)
    new = gaussian(2, batch, 1, heads, dim, seed=2).to(dtype).transpose(2, 3)
    keys, values = gaussian(2, batch, heads, room, dim, seed=3).to(dtype).clone()
    for b, n in enumerate(lengths):
        keys[b, :, n:], values[b, :, n:] = torch.nan, torch.nan  # memory nobody wrote
    part, lse = gaussian(batch, heads * groups, 1, dim, seed=4), gaussian(batch, heads * groups, 1, seed=5)
    part[0], lse[0] = 0, -torch.inf
    sink = gaussian(heads * groups, seed=6) if with_sink else None
    held = torch.tensor(lengths, dtype=torch.int32)
    return [query, *new, keys, values, held, part, lse, sink, dim**-0.5]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("dim", "heads", "groups", "room", "with_sink"),
    [(64, 3, 3, 208, False), (80, 2, 2, 70, True), (96, 2, 5, 100, True), (128, 2, 4, 33, False),
     (192, 1, 7, 40, True), (256, 1, 16, 333, False)],
)  # fmt: skip
def test_window_agrees_with_the_reference(isa, dtype, dim, heads, groups, room, with_sink):
    given = arguments(dim, heads, groups, room, [room - 1, 0, 17, room // 2], dtype, with_sink)
    copies = given[3].clone(), given[4].clone()
    got = ops.window_attend(*given)
    wanted = reference.window_attend(*given[:3], *copies, *given[5:])
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for mine, other in zip(given[3:5], copies, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_logits_far_apart_and_numbers_that_are_none(isa):
    given = arguments(64, 2, 2, 40, [30, 30, 30], torch.float32)
    given[0] *= 100
    given[0][1] = torch.nan
    given[7][2] = 500  # the encoded part outweighs the window
    wanted = reference.window_attend(*given[:3], given[3].clone(), given[4].clone(), *given[5:])
    got = ops.window_attend(*given)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert got[1].isnan().all(), "not hidden"


def test_numbers_round_to_even_and_overflow_to_infinity(isa):
    # With one token the output is its value, merged with nothing.
    given = arguments(64, 1, 1, 4, [0], torch.float32)
    exact = torch.cat((gaussian(16, seed=7), 2.0 ** torch.arange(-30, 18)))
    for dtype in (torch.float16, torch.bfloat16):
        few = [x.to(dtype) if i < 5 else x for i, x in enumerate(given)]
        few[6], few[7] = exact.expand(1, 1, 1, 64).contiguous(), torch.full((1, 1, 1), 1e4)
        got = ops.window_attend(*few)
        assert torch.equal(got.flatten(), exact.to(dtype))


def test_a_full_row_is_refused(isa):
    given = arguments(64, 1, 1, 4, [4], torch.float32)
    with pytest.raises(IndexError, match="no room"):
        ops.window_attend(*given)


def test_mixed_dtypes_run_the_reference(isa):
    given = arguments(64, 1, 1, 4, [2], torch.float32)
    given[0] = given[0].bfloat16()
    wanted = reference.window_attend(*given[:3], given[3].clone(), given[4].clone(), *given[5:])
    assert torch.equal(ops.window_attend(*given), wanted)
