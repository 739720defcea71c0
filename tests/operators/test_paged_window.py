"""`paged_window_attend` against `window_attend` on the same tokens, packed."""

import pytest
import torch
from paged_window import check_stored, given, packed

from selfindex.backends import reference
from selfindex.backends.operators import paged_window_attend as module

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "groups"), [(2, 4), (3, 1), (1, 7)])
@pytest.mark.parametrize(("with_sink", "size"), [(False, 16), (True, 32)])
def test_paged_is_packed(dtype, dim, heads, groups, with_sink, size):
    arguments, tokens = given(dim, heads, groups, dtype, with_sink, size)
    before = arguments[3].clone()
    got, wanted = reference.paged_window_attend(*arguments), packed(arguments, tokens)
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    check_stored(arguments, before)


@pytest.mark.parametrize("with_sink", [False, True])
def test_rows_of_padding_read_and_write_nothing(with_sink):
    arguments, tokens = given(64, 2, 2, torch.float32, with_sink)
    wanted = packed(arguments, tokens)
    padding = [1, 4]
    arguments[6][padding] = torch.tensor([-1, -100], dtype=torch.int32)
    arguments[4][padding] = 1 << 30
    for i in (0, 1, 2, 8, 9):
        arguments[i][padding] = torch.nan
    arguments[4][padding] = 0
    before = arguments[3].clone()
    got = reference.paged_window_attend(*arguments)
    others = [0, 2, 3, 5]
    torch.testing.assert_close(got[others], wanted[others], atol=2e-6, rtol=2e-6)
    assert not got[padding].any()
    check_stored(arguments, before)
    arguments[6][:] = -1
    assert not reference.paged_window_attend(*arguments).any(), "nothing but padding"


def test_tokens_in_the_null_block_do_not_exist():
    # The sinks' block and one in the middle were never filled: the rest is what a later start leaves.
    arguments, tokens = given(64, 2, 2, torch.float32)
    table = arguments[4]
    table[2, 0] = 0  # row 2 starts at 21: its sinks
    table[5, :] = 0
    table[0, :2] = 0  # row 0 starts at 0: from 32 on
    got = reference.paged_window_attend(*arguments)
    arguments[5][0] = 32
    arguments[7] = 0
    wanted = packed(arguments, tokens)
    torch.testing.assert_close(got[[0, 2]], wanted[[0, 2]], atol=2e-6, rtol=2e-6)
    assert arguments[3][0].isnan().all(), "nothing is stored there"


def test_long_windows_are_gathered_in_parts(monkeypatch):
    arguments, tokens = given(64, 2, 2, torch.float32)
    monkeypatch.setattr(module, "PAGED_CHUNK", 7)
    got = reference.paged_window_attend(*arguments)
    torch.testing.assert_close(got, packed(arguments, tokens), atol=2e-6, rtol=2e-6)
