"""Compiled `paged_window_attend` against the reference."""

import pytest
import torch
from engine_memory import window
from pages import gaussian

from selfindex.backends import ops, reference

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
STARTS, LENGTHS, SINKS = (0, 16, 21, 3, 0, 90, 7), (40, 16, 88, 30, 0, 95, -1), 5


def arguments(dim, heads, groups, dtype, with_sink=False, size=16):
    """Rows of `LENGTHS` tokens, of which those from `STARTS` on are in full precision; one of padding."""
    batch = len(LENGTHS)
    # Heads of a projection's output lie side by side, as in a model.
    query = gaussian(batch, 1, heads * groups, dim, seed=1).to(dtype).transpose(1, 2)
    new = gaussian(2, batch, 1, heads, dim, seed=2).to(dtype).transpose(2, 3)
    keys, values = gaussian(2, batch, heads, max(LENGTHS) + 1, dim, seed=3).to(dtype)
    held, table = window(keys, values, LENGTHS, size)
    part, lse = gaussian(batch, heads * groups, 1, dim, seed=4), gaussian(batch, heads * groups, 1, seed=5)
    part[0], lse[0] = 0, -torch.inf  # rows without an encoded page
    sink = gaussian(heads * groups, seed=6) if with_sink else None
    numbers = (torch.tensor(x, dtype=torch.int32) for x in (STARTS, LENGTHS))
    return [query, *new, held, table, *numbers, SINKS, part, lse, sink, dim**-0.5]


def check(given):
    """Output and window are the reference's. Returns the output."""
    dtype, copy = given[0].dtype, given[3].clone()
    wanted = reference.paged_window_attend(*given[:3], copy, *given[4:])
    got = ops.paged_window_attend(*given)
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(given[3], copy, rtol=0, atol=0, equal_nan=True)
    return got


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "groups"), [(2, 4), (3, 1), (1, 7)])
@pytest.mark.parametrize(("with_sink", "size"), [(False, 16), (True, 32)])
def test_agrees_with_the_reference(isa, dtype, dim, heads, groups, with_sink, size):
    assert not check(arguments(dim, heads, groups, dtype, with_sink, size))[-1].any(), "padding"


def test_rows_of_padding_read_and_write_nothing(isa):
    given = arguments(64, 2, 2, torch.float32, with_sink=True)
    given[4][6], given[5][6] = 1 << 30, -5
    for i in (0, 1, 2, 8, 9):
        given[i][6] = torch.nan
    assert not ops.paged_window_attend(*given)[6].any()
    given[6][:] = -1
    before = given[3].clone()
    assert not ops.paged_window_attend(*given).any(), "nothing but padding"
    torch.testing.assert_close(given[3], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("with_sink", [False, True])
def test_tokens_in_the_null_block_do_not_exist(isa, with_sink):
    given = arguments(64, 2, 2, torch.float32, with_sink)
    table = given[4]
    table[2, 0] = 0
    table[0, :2] = 0
    table[5] = 0  # the new token as well
    table[4] = 0
    given[8][4], given[9][4] = 0, -torch.inf  # nothing at all
    assert not check(given)[4].any()


def test_places_that_do_not_exist_are_refused_before_anything_is_written(isa):
    given = arguments(64, 2, 2, torch.float32)
    before, columns = given[3].clone(), given[4].shape[1]
    for index, row, value, message in (
        (4, 2, -1, "outside the window"),
        (4, 2, len(before), "outside the window"),
        (6, 5, 16 * columns, "outside the window's table"),
        (5, 5, 96, "behind its new one"),
    ):
        wrong = [x.clone() if i in (4, 5, 6) else x for i, x in enumerate(given)]
        wrong[index][row] = value
        with pytest.raises(IndexError, match=message):
            ops.paged_window_attend(*wrong)
    torch.testing.assert_close(given[3], before, rtol=0, atol=0, equal_nan=True)


def test_threads_do_not_change_the_result(isa):
    given = arguments(128, 2, 4, torch.bfloat16)
    alone = ops.paged_window_attend(*given)
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.paged_window_attend(*given), alone)
    finally:
        torch.set_num_threads(1)
