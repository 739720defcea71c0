"""Table sums in bytes: exact on the quantised tables, and close to the float tables."""

import pytest
import torch
from pages import gaussian

from selfindex.backends.cpu.loader import native
from selfindex.codec import PageFormat, codec_for
from selfindex.index.lut import lookup_by_group

ZERO, LEVELS = 64, 63


def tables_of(queries):
    """(uint8 [rows, d / 4, 16], step [rows]) of mapped queries [rows, d]."""
    tables = torch.empty(*queries.shape[:-1], queries.shape[1] // 4, 16, dtype=torch.uint8)
    steps = [
        native().make_tables(q.data_ptr(), q.shape[0], t.data_ptr())
        for q, t in zip(queries, tables, strict=True)
    ]
    return tables, torch.tensor(steps)


def split_tables_of(query, codebook):
    """(tables uint8 [2, d / 4, 16], step) of a query [d] and a codebook [d / 4, 16, 4]."""
    tables = torch.empty(2, *codebook.shape[:2], dtype=torch.uint8)
    arguments = query.data_ptr(), codebook.data_ptr(), query.shape[0], tables.data_ptr()
    return tables, native().make_split_tables(*arguments)


def sums_of(isa, codes, tables):
    sums = torch.empty(tables.shape[0], codes.shape[0], dtype=torch.int16)
    native().lookup(isa, codes.data_ptr(), *codes.shape, tables.data_ptr(), tables.shape[0], sums.data_ptr())
    return sums


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("tokens", "rows"), [(128, 4), (1, 1), (33, 2), (100, 3), (8, 1), (512, 4)])
def test_sums_are_exact(isa, dim, tokens, rows):
    codes = torch.randint(256, (tokens, dim // 8), dtype=torch.uint8)
    # The largest entries that occur, so that nothing may overflow.
    tables = torch.randint(128, (rows, dim // 4, 16), dtype=torch.uint8)
    tables[0] = 127
    wanted = lookup_by_group(tables.float(), codes)
    assert torch.equal(sums_of(isa, codes, tables).float(), wanted)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_quantised_scores_are_within_the_bound(isa, dim):
    queries, codes = gaussian(4, dim, seed=1), torch.randint(256, (300, dim // 8), dtype=torch.uint8)
    queries[1] *= 1e-6
    queries[2, 5] = 300  # one loud channel takes all levels
    tables, steps = tables_of(queries)
    sums = sums_of(isa, codes, tables).float() - ZERO * dim / 4
    lut = codec_for(PageFormat("balanced", 1, dim, 128).name).lut(queries, torch.ones(1, 1, dim))
    exact = lookup_by_group(lut, codes)
    error = (sums * steps[:, None] - exact).abs()
    # Every entry is rounded to a step, half of one at most.
    assert (error <= dim / 4 * steps[:, None] / 2 * 1.0001).all()
    assert torch.allclose(steps, lut.abs().amax((1, 2)) / LEVELS)
    # Roundings do not add up in practice: the error is small against the spread of scores.
    assert (error[0].square().mean() < 1e-3 * exact[0].var()).all()


def test_a_query_of_zeros_has_flat_tables():
    tables, steps = tables_of(torch.zeros(1, 64))
    assert (tables == ZERO).all()
    assert steps == 0


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("loud", [1, 300])
def test_split_tables_score_within_the_bound(isa, dim, loud):
    query, codebook = gaussian(dim, seed=1), gaussian(dim // 4, 16, 4, seed=2)
    query[5] *= loud
    codes = torch.randint(256, (300, dim // 8), dtype=torch.uint8)
    tables, step = split_tables_of(query, codebook)
    assert tables.max() < 128
    high, low = sums_of(isa, codes, tables).float()
    lut = (codebook @ query.view(-1, 4, 1)).squeeze(-1)
    assert step == pytest.approx(float((lut.amax(-1) - lut.amin(-1)).max()) / 16382)
    exact = lookup_by_group(lut[None], codes)[0]
    error = (128 * high + low) * step - exact
    # Half a step a group, and a constant that does not change the order.
    assert error.max() - error.min() <= dim / 4 * step * 1.01 + 1e-6 * exact.abs().max()


def test_split_tables_of_zeros_are_flat_and_what_is_not_a_number_says_so():
    codebook = gaussian(16, 16, 4)
    tables, step = split_tables_of(torch.zeros(64), codebook)
    assert step == 0
    assert all(len(half.unique()) == 1 for half in tables)
    for wrong in (torch.nan, torch.inf):
        query = torch.ones(64)
        query[7] = wrong
        tables, step = split_tables_of(query, codebook)
        assert step != step
        assert tables.max() < 128
