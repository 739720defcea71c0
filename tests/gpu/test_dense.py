"""`dense_attend` on the GPU against the float32 reference."""

import pytest
import torch
from caches import make_cache
from pages import PRESETS as KINDS
from pages import relative_error

from selfindex.backends import ops, reference
from selfindex.backends.cuda import dense
from selfindex.backends.cuda.dense import splits_for
from selfindex.backends.cuda.loader import load

pytestmark = pytest.mark.gpu

SHAPES = [
    # dim, heads, groups, bits, dtype
    (128, 2, 4, 2, torch.bfloat16),
    (128, 2, 4, 3, torch.float16),
    (128, 1, 7, 3, torch.bfloat16),
    (128, 1, 16, 2, torch.float32),
    (64, 2, 4, 2, torch.bfloat16),
    (64, 1, 1, 3, torch.float32),
    (96, 2, 3, 2, torch.float16),
    (96, 1, 4, 3, torch.bfloat16),
    (256, 2, 4, 2, torch.bfloat16),
    (256, 1, 16, 3, torch.float16),
]
CASES = [("balanced", *shape) for shape in SHAPES]
CASES += [("paper", *shape[:3], 2, shape[4]) for shape in SHAPES]
PRESETS = ("balanced", "paper")
QUERIES = (1, 5, 16, 33, 300)


def arguments(cache, queries, seed=0):
    """Operator arguments with `queries` new queries, laid out as they leave a projection."""
    generator = torch.Generator("cuda").manual_seed(seed)
    b, heads, _, dim = cache.query.shape
    query = 2 * torch.randn(b, queries, heads, dim, generator=generator, device="cuda")
    query = query.transpose(1, 2).to(cache.query.dtype)
    query[:, :, 0] = cache.query[:, :, 0]
    pools = (cache.index, cache.payload, cache.table, cache.counts)
    return (query, *pools, cache.constants, cache.scaling, cache.fmt.name)


def poison():
    """Freed memory that the next call's outputs and workspace come from."""
    junk = torch.full((1 << 26,), 0x7F, dtype=torch.uint8, device="cuda")
    del junk


def check(call, tolerance=4e-3, lse_tolerance=8e-3):
    poison()
    output, lse = ops.dense_attend(*call)
    wanted, wanted_lse = reference.dense_attend(*call)
    assert relative_error(output, wanted) < tolerance
    torch.testing.assert_close(lse, wanted_lse, atol=lse_tolerance, rtol=0)
    return output, lse


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize(("preset", "dim", "heads", "groups", "bits", "dtype"), CASES)
def test_dense_agrees_with_the_reference(preset, dim, heads, groups, bits, dtype, queries):
    cache = make_cache([2500, 0, 41, 1300], dim, heads, groups, bits, dtype, preset, short=(3, 5))
    call = arguments(cache, queries)
    output, lse = check(call)
    assert (output[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    again = ops.dense_attend(*call)
    assert torch.equal(again[0], output), "the result does not depend on timing"
    assert torch.equal(again[1], lse)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("preset", "bits"), KINDS)
def test_the_kernel_of_other_generations_than_hopper(dim, preset, bits, monkeypatch):
    def load_others(*specialised):
        return {name: kernel for name, kernel in load(*specialised).items() if "wgmma" not in name}

    monkeypatch.setattr(dense, "load", load_others)
    check(arguments(make_cache([2500, 0, 41, 1300], dim, bits=bits, preset=preset, short=(3, 5)), 100))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("queries", [1, 64])
def test_pages_without_tokens_are_skipped_anywhere(queries, preset):
    cache = make_cache([3000, 3000], preset=preset)
    cache.counts[0, 3:9] = 0
    cache.counts[0, 0] = 0
    cache.counts[1, -5:] = 0
    cache.table[cache.counts == 0] = 1 << 30
    call = arguments(cache, queries)
    poison()
    output, lse = ops.dense_attend(*call)
    cache.table[cache.counts == 0] = 0
    wanted, wanted_lse = reference.dense_attend(*call)
    assert relative_error(output, wanted) < 4e-3
    torch.testing.assert_close(lse, wanted_lse, atol=8e-3, rtol=0)


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("bits", [2, 3])
def test_pages_of_very_different_values(queries, bits):
    """A page's values may be far smaller than another's and still make up the output."""
    cache = make_cache([1000], bits=bits)
    small, large = cache.table[0, 2:], cache.table[0, :2]
    base = cache.fmt.view(cache.index, cache.fmt.index, "value_base")
    base[small.long()] *= 1e-4
    base[large.long()] *= 1e4
    base[small[-1].long()] = 0
    call = arguments(cache, queries)
    check(call)
    # Keys of the large pages that no query looks at: only small values are left.
    cache.fmt.view(cache.index, cache.fmt.index, "key_base")[large.long()] = 0
    step = cache.fmt.view(cache.index, cache.fmt.index, "mean_step")
    step[large.long()] = 0
    check((*call[:6], 0.5, call[7]), 1e-2, 4e-2)


@pytest.mark.parametrize("queries", [1, 64])
def test_tokens_of_very_different_values_and_keys_far_beyond_the_prompts(queries):
    """The paper preset has scales and zero points in half precision, decoded up to four times its range."""
    cache = make_cache([1000], preset="paper")

    def array(name):
        return cache.fmt.view(cache.payload, cache.fmt.payload, name)

    small, large = cache.table[0, 2:].long(), cache.table[0, :2].long()
    for name in ("value_scale", "value_zero"):
        array(name)[small] *= 2**-7
        array(name)[large] *= 2**7
        array(name)[small[-1], :, 3:50] = 0
    call = arguments(cache, queries)
    check(call)
    array("value_scale")[large[0], 0, 7] = -60000  # mirrored: from the largest number down
    check(call)
    array("key_zero")[large] = 0
    array("key_scale")[large] = 0
    array("key_zero")[small[0], :, 9] = 65504
    array("key_scale")[small[0], :, 9] = 60000
    check((*call[:6], 1e-6, call[7]), 2e-2, 4e-2)


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_that_share_blocks_and_constants_per_row(preset):
    cache = make_cache([3000, 2000], preset=preset, shared=True)
    cache.constants = torch.cat((cache.constants, 2 * cache.constants))
    check(arguments(cache, 40))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("queries", [1, 200])
def test_a_call_can_be_captured_and_replayed_with_other_lengths(queries, preset):
    cache = make_cache([4000, 4000], preset=preset)
    call = arguments(cache, queries)
    ops.dense_attend(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.dense_attend(*call)
    cache.counts[1, 10:] = 0
    call[0].copy_(torch.randn_like(call[0]))
    graph.replay()
    for got, wanted in zip(captured, ops.dense_attend(*call), strict=True):
        assert torch.equal(got, wanted)


def test_calls_the_kernels_do_not_serve_run_the_reference():
    cache = make_cache([500, 700], dim=64)
    query, *rest = arguments(cache, 3)
    call = (query.transpose(2, 3).contiguous().transpose(2, 3), *rest)
    for got, wanted in zip(ops.dense_attend(*call), reference.dense_attend(*call), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("tiles", "pages"), [(8, 1), (8, 8), (8, 1024), (300, 256), (512, 1024), (5000, 3)])
def test_splits_fill_the_device_and_leave_none_empty(tiles, pages):
    splits = splits_for(tiles, pages, 264, 1 << 20)
    assert 1 <= splits <= pages
    assert tiles * splits >= min(tiles * pages, 132)
