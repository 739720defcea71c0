"""`sparse_decode` on the GPU against the float32 reference."""

import pytest
import torch
from caches import make_cache, tokens, votes
from pages import relative_error

from selfindex.backends import ops, reference
from selfindex.backends.cuda.decode import Decode

pytestmark = pytest.mark.gpu

SHAPES = [
    # dim, heads, groups, bits, dtype
    (128, 2, 4, 2, torch.bfloat16),
    (128, 2, 4, 3, torch.float16),
    (128, 1, 1, 2, torch.float32),
    (128, 2, 2, 2, torch.float16),
    (128, 1, 7, 3, torch.bfloat16),
    (128, 1, 16, 2, torch.bfloat16),
    (64, 2, 4, 2, torch.bfloat16),
    (64, 1, 8, 3, torch.float32),
    (96, 2, 3, 2, torch.float16),
    (96, 1, 4, 3, torch.bfloat16),
    (256, 2, 4, 2, torch.bfloat16),
    (256, 1, 16, 3, torch.float16),
]
CASES = [("balanced", *shape) for shape in SHAPES]
CASES += [("paper", *shape[:3], 2, shape[4]) for shape in SHAPES]
PRESETS = ("balanced", "paper")


def selected_sets(call, budgets):
    rows = call.selected[:, :, 0].tolist()
    return [[row[:budget] for row in heads] for heads, budget in zip(rows, budgets, strict=True)]


@pytest.mark.parametrize(("preset", "dim", "heads", "groups", "bits", "dtype"), CASES)
def test_decode_agrees_with_the_reference(preset, dim, heads, groups, bits, dtype):
    cache = make_cache([5000, 41, 1300], dim, heads, groups, bits, dtype, preset, short=(3, 5))
    have = tokens(cache)
    budgets = [400, have[1], 130]
    arguments = cache.decode_arguments(budgets, width=450)
    call = Decode(*arguments)
    call.workspace.fill_(0x7F)
    call.output.fill_(torch.nan)
    call.lse.fill_(torch.nan)
    output, lse = call.run()
    assert torch.isfinite(output).all()
    assert torch.isfinite(lse).all()

    mass = votes(cache)
    best = reference.select(mass, arguments[5], 450)
    for b, heads_of_row in enumerate(selected_sets(call, budgets)):
        for h, slots in enumerate(heads_of_row):
            assert slots == sorted(set(slots)), "ascending and distinct"
            assert torch.isfinite(mass[b, h, 0, slots]).all(), "only existing tokens"
            wanted = set(best[b, h, 0, : budgets[b]].tolist())
            # A score of the paper preset is a sum of exact table entries, of balanced one of estimates.
            assert len(wanted & set(slots)) >= (0.98 if preset == "paper" else 0.93) * budgets[b]
            got_mass = mass[b, h, 0, slots].sum()
            assert got_mass >= 0.998 * mass[b, h, 0, sorted(wanted)].sum()

    # The same tokens through the reference attention: only arithmetic differs.
    slots = call.selected.clone()
    for b, budget in enumerate(budgets):
        slots[b, ..., budget:] = -1
    wanted_output, wanted_lse = reference.sparse_attend(*arguments[:4], slots, *arguments[7:])
    assert relative_error(output, wanted_output) < 2e-3
    torch.testing.assert_close(lse, wanted_lse, atol=2e-3, rtol=0)

    again = ops.sparse_decode(*arguments)
    assert torch.equal(again[0], output), "the result does not depend on timing"
    assert torch.equal(again[1], lse)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_rows_that_keep_everything_equal_dense_attention(dim, preset):
    cache = make_cache([1000, 128, 1], dim, 2, 4, preset=preset, short=(2,))
    arguments = cache.decode_arguments(tokens(cache))
    output, lse = ops.sparse_decode(*arguments)
    wanted, wanted_lse = reference.dense_attend(*arguments[:5], *arguments[7:])
    assert relative_error(output, wanted) < 2e-3
    torch.testing.assert_close(lse, wanted_lse, atol=2e-3, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_without_tokens_or_budget_gives_no_weight(preset):
    cache = make_cache([700, 0, 700], preset=preset)
    output, lse = ops.sparse_decode(*cache.decode_arguments([50, 0, 0]))
    assert torch.isfinite(output).all()
    assert (lse[1:] == -torch.inf).all()
    assert (output[1:] == 0).all()
    assert torch.isfinite(lse[0]).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_budgets_beyond_a_rows_tokens_read_what_there_is(preset):
    cache = make_cache([300, 900], preset=preset)
    output, lse = ops.sparse_decode(*cache.decode_arguments([800, 800]))
    exact = ops.sparse_decode(*cache.decode_arguments([300, 800], width=800))
    assert torch.equal(output, exact[0])
    assert torch.equal(lse, exact[1])


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_that_share_blocks_and_constants_per_row(preset):
    cache = make_cache([3000, 2000], preset=preset, shared=True)
    cache.constants = torch.cat((cache.constants, 1.5 * cache.constants))
    cache.query[1] = cache.query[0]
    arguments = cache.decode_arguments([200, 150])
    call = Decode(*arguments)
    output, lse = call.run()
    slots = call.selected.clone()
    slots[1, ..., 150:] = -1
    # The same tokens through the reference attention: only arithmetic differs.
    wanted, wanted_lse = reference.sparse_attend(*arguments[:4], slots, *arguments[7:])
    assert relative_error(output, wanted) < 2e-3
    torch.testing.assert_close(lse, wanted_lse, atol=2e-3, rtol=0)
    best = reference.select(votes(cache), arguments[5], 200)
    for b, heads in enumerate(selected_sets(call, [200, 150])):
        for h, chosen in enumerate(heads):
            wanted_set = set(best[b, h, 0, : len(chosen)].tolist())
            assert len(wanted_set & set(chosen)) >= 0.9 * len(chosen)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("batch", [1, 9, 40])
def test_batches_of_every_size(batch, preset):
    """One row, some, and more rows than blocks fit at once, 100 times apart in length."""
    lengths = [20000] + [200 + 97 * b for b in range(batch - 1)]
    cache = make_cache(lengths, heads=8, preset=preset)
    budgets = [max(1, n // 20) for n in lengths]
    arguments = cache.decode_arguments(budgets)
    call = Decode(*arguments)
    output, lse = call.run()
    slots = call.selected.clone()
    for b, budget in enumerate(budgets):
        slots[b, ..., budget:] = -1
        assert (slots[b, ..., 1:budget] > slots[b, ..., : budget - 1]).all()
    wanted, wanted_lse = reference.sparse_attend(*arguments[:4], slots, *arguments[7:])
    assert relative_error(output, wanted) < 2e-3
    torch.testing.assert_close(lse, wanted_lse, atol=2e-3, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_several_queries_select_as_each_of_them_alone(preset):
    cache = make_cache([500, 700], dim=64, preset=preset)
    query = torch.randn(2, cache.query.shape[1], 5, 64, device="cuda", dtype=cache.query.dtype)
    alone = []
    for cache.query in query.split(1, 2):
        alone.append(ops.sparse_decode(*cache.decode_arguments([30, 90])))
    cache.query = query
    output, lse = ops.sparse_decode(*cache.decode_arguments([30, 90]))
    assert torch.equal(output, torch.cat([x for x, _ in alone], 2))
    assert torch.equal(lse, torch.cat([x for _, x in alone], 2))


def test_calls_the_kernels_do_not_serve_run_the_reference():
    cache = make_cache([500, 700], dim=64)
    cache.query = torch.cat((cache.query, -cache.query) * 5, 2)
    arguments = cache.decode_arguments([30, 30])
    for got, wanted in zip(ops.sparse_decode(*arguments), reference.sparse_decode(*arguments), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_call_can_be_captured_and_replayed_with_other_lengths(preset):
    cache = make_cache([4000, 4000], preset=preset)
    arguments = cache.decode_arguments([200, 200])
    ops.sparse_decode(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sparse_decode(*arguments)
    cache.counts[1, 10:] = 0
    arguments[5][1] = 60
    cache.query.copy_(torch.randn_like(cache.query))
    graph.replay()
    for got, wanted in zip(captured, ops.sparse_decode(*arguments), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "groups"), [("balanced", 4), ("balanced", 16), ("paper", 4)])
def test_a_million_tokens(preset, groups):
    """Codes past what shared memory holds, pool offsets past 2**31."""
    cache = make_cache([128 * 6], heads=4, groups=groups, preset=preset)
    pages, far = 8192, -(-(2**31) // cache.fmt.payload_bytes) + 10
    index = torch.zeros(far + 9, cache.fmt.index_bytes, dtype=torch.uint8, device="cuda")
    payload = torch.zeros(far + 9, cache.fmt.payload_bytes, dtype=torch.uint8, device="cuda")
    index[far : far + 9], payload[far : far + 9] = cache.index, cache.payload
    generator = torch.Generator("cuda").manual_seed(1)
    cache.index, cache.payload = index, payload
    cache.table = torch.randint(
        far, far + 9, (1, pages), generator=generator, device="cuda", dtype=torch.int32
    )
    cache.counts = torch.full((1, pages), 128, dtype=torch.int32, device="cuda")
    budget = 128 * pages // 20
    arguments = cache.decode_arguments([budget])
    call = Decode(*arguments)
    output, lse = call.run()
    slots = call.selected
    assert (slots[..., 1:] > slots[..., :-1]).all()
    assert int(slots.max()) < 128 * pages
    wanted, wanted_lse = reference.sparse_attend(*arguments[:4], slots, *arguments[7:])
    assert relative_error(output, wanted) < 2e-3
    torch.testing.assert_close(lse, wanted_lse, atol=2e-3, rtol=0)
