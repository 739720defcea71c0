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
