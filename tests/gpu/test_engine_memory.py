"""Operators on memory that an engine owns: pools with strides, pages encoded in place, paged windows."""

from contextlib import contextmanager

import pytest
import torch
from caches import make_cache, tokens
from engine_memory import check_pools, empty_pools, pools, window
from paged_window import SINKS, check_stored, given, moved, packed
from pages import PRESETS, constants_for, gaussian, page_format, relative_error

from selfindex.backends import ops, reference
from selfindex.backends.cuda import window as paged
from selfindex.backends.fallback import observed

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@contextmanager
def served():
    """The kernels serve every call in the block."""
    seen = []
    with observed(lambda name, fast, arguments: seen.append((name, fast))):
        yield
    assert seen
    assert all(fast for _, fast in seen), seen


def captured(call):
    """Run once, then record a graph: (graph, result of its replays)."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("gap", [0, 16, 4096])
@pytest.mark.parametrize(
    ("preset", "dim", "heads", "groups", "bits", "dtype"),
    [
        ("balanced", 128, 2, 4, 2, torch.bfloat16),
        ("balanced", 128, 1, 7, 3, torch.float16),
        ("balanced", 64, 3, 1, 3, torch.float32),
        ("balanced", 96, 1, 4, 3, torch.bfloat16),
        ("balanced", 256, 1, 16, 2, torch.float16),
        ("paper", 128, 2, 4, 2, torch.bfloat16),
        ("paper", 64, 3, 1, 2, torch.float32),
        ("paper", 96, 1, 4, 2, torch.bfloat16),
        ("paper", 256, 1, 16, 2, torch.float16),
    ],
)
def test_pools_with_strides_change_no_bit(preset, dim, heads, groups, bits, dtype, gap):
    cache = make_cache([5000, 41, 1300], dim, heads, groups, bits, dtype, preset, short=(3, 5))
    cache.counts[2, 3:] = 0
    budgets, strided = [400, 0, 130], pools(cache.fmt, cache.index, cache.payload, gap)
    arguments = cache.decode_arguments(budgets, width=450)
    with served():
        wanted = ops.sparse_decode(*arguments)
        got = ops.sparse_decode(arguments[0], *strided, *arguments[3:])
        assert all(map(torch.equal, got, wanted))
        for queries in (1, 20, 200):  # narrow tiles, wide ones, and warp groups of Hopper
            query = gaussian(3, heads * groups, queries, dim, seed=queries, dtype=dtype).cuda()
            rest = cache.table, cache.counts, cache.constants, cache.scaling, cache.fmt.name
            wanted = ops.dense_attend(query, cache.index, cache.payload, *rest)
            assert all(map(torch.equal, ops.dense_attend(query, *strided, *rest), wanted))


def test_a_pool_that_begins_anywhere_is_the_references():
    cache = make_cache([700, 300])
    memory = torch.zeros(len(cache.index), cache.fmt.index_bytes + 24, dtype=torch.uint8, device="cuda")
    index = memory[:, 8:-16]
    index.copy_(cache.index)
    arguments = cache.decode_arguments(tokens(cache))
    got = ops.sparse_decode(arguments[0], index, *arguments[2:])
    wanted = reference.sparse_decode(*arguments)
    assert relative_error(got[0], wanted[0]) < 1e-5


def pages_of(fmt, dtype, n=6):
    dim = fmt.head_dim
    raw = gaussian(2, n, 128, fmt.kv_heads, dim, seed=dim) + torch.linspace(-1, 1, dim)
    keys, values = raw.to(dtype).cuda().transpose(2, 3)
    return keys, values, constants_for(fmt, keys[:1]).cuda()


def numbers(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_into_writes_the_bytes_of_encode_and_can_be_replayed(dim, preset, bits, dtype):
    fmt = page_format(preset, bits, 3, dim, 128)
    keys, values, constants = pages_of(fmt, dtype)
    counts, blocks = numbers(128, 1, 77, 128, 0, 127), numbers(3, -1, 0, 8, 5, -1)
    found = empty_pools(fmt, 9, "cuda")
    with served():
        graph, _ = captured(
            lambda: ops.encode_into(keys, values, counts, blocks, *found, constants, fmt.name)
        )
    check_pools(found, ops.encode(keys, values, counts, constants, fmt.name), blocks.tolist())
    # Other tokens, counts and blocks; then none at all.
    for pool in found:
        pool.fill_(0x5A)
    keys.copy_(keys.flip(0))
    counts.copy_(numbers(5, 128, 128, 128, 128, 3))
    blocks.copy_(numbers(-1, 7, 6, 5, -1, 1))
    graph.replay()
    check_pools(found, ops.encode(keys, values, counts, constants, fmt.name), blocks.tolist())
    for pool in found:
        pool.fill_(0x5A)
    blocks.fill_(-1)
    graph.replay()
    check_pools(found, found, [-1] * 9)


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_pages_may_have_constants_of_their_own(preset):
    fmt = page_format(preset, 2, 2, 128, 128)
    keys, values, constants = pages_of(fmt, torch.bfloat16)
    own = constants * torch.linspace(1, 2, 6, device="cuda")[:, None, None]
    counts, found = numbers(*[128] * 6), empty_pools(fmt, 6, "cuda")
    ops.encode_into(keys, values, counts, numbers(*range(6)), *found, own, fmt.name)
    alone = [
        ops.encode(keys[i : i + 1], values[i : i + 1], counts[:1], own[i : i + 1], fmt.name) for i in range(6)
    ]
    check_pools(found, [torch.cat(planes) for planes in zip(*alone, strict=True)], range(6))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("preset", "bits"), PRESETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 32])
def test_encode_paged_takes_its_tokens_from_blocks_and_can_be_replayed(dim, preset, bits, dtype, size):
    fmt, heads, lengths = page_format(preset, bits, 3, dim, 128), 3, [300, 128, -1, 200]
    keys, values = gaussian(2, 4, heads, 300, dim, seed=dim, dtype=dtype)
    held, table = (moved(x, "cuda") for x in window(keys, values, lengths, size))
    _, _, constants = pages_of(fmt, dtype, 1)
    # A short first page, whole ones from the middle of a block, and a row that is none.
    first, counts = numbers(16, 0, -128, 77), numbers(112, 128, 128, 123)
    blocks, found = numbers(2, -1, -1, 4), empty_pools(fmt, 6, "cuda")

    def check():
        pages = [x.new_zeros(4, heads, 128, dim) for x in (keys, values)]
        for b, (start, n) in enumerate(zip(first.tolist(), counts.tolist(), strict=True)):
            for page, x in zip(pages, (keys, values), strict=True):
                if b != 2:
                    page[b, :, :n] = x[b, :, start : start + n]
        wanted = ops.encode(*(x.cuda() for x in pages), counts, constants, fmt.name)
        check_pools(found, wanted, blocks.tolist())

    with served():
        graph, _ = captured(
            lambda: ops.encode_paged(held, table, first, counts, blocks, *found, constants, fmt.name)
        )
    check()
    for pool in found:
        pool.fill_(0x5A)
    first.copy_(numbers(128, 1, 0, 70))
    counts.copy_(numbers(128, 7, 9, 128))
    blocks.copy_(numbers(5, 0, -9, 3))
    graph.replay()
    check()
    for pool in found:
        pool.fill_(0x5A)
    blocks.fill_(-1)
    table.fill_(1 << 30)
    graph.replay()
    check_pools(found, found, [-1] * 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "heads", "groups"), [(64, 3, 3), (96, 2, 5), (128, 8, 4), (128, 1, 1), (256, 1, 16)]
)
@pytest.mark.parametrize(("with_sink", "size", "part"), [(False, 16, 512), (True, 32, 512), (True, 16, 24)])
def test_paged_window_agrees_with_the_reference(
    dim, heads, groups, dtype, with_sink, size, part, monkeypatch
):
    monkeypatch.setattr(paged, "PART", part)  # of the last, rows have up to four
    arguments, held = given(dim, heads, groups, dtype, with_sink, size, device="cuda")
    before = arguments[3].clone()
    with served():
        got = ops.paged_window_attend(*arguments)
    wanted = packed(arguments, held)
    assert got.dtype == dtype
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    check_stored(arguments, before)
    again = ops.paged_window_attend(*arguments)
    assert torch.equal(got, again)


@pytest.mark.parametrize("batch", [1, 40])
def test_long_paged_windows(batch):
    """Few rows and many, of several parts; sinks far from the rest."""
    lengths = [3000 - 37 * b for b in range(batch)]
    starts = [min(n, max(0, n - 1200 + 31 * b)) for b, n in enumerate(lengths)]
    arguments, held = given(128, 8, 4, torch.bfloat16, True, starts=starts, lengths=lengths, device="cuda")
    got, wanted = ops.paged_window_attend(*arguments), packed(arguments, held)
    torch.testing.assert_close(got.float(), wanted.float(), atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize("with_sink", [False, True])
def test_rows_of_padding_and_null_blocks_in_a_graph(with_sink):
    arguments, held = given(128, 2, 4, torch.bfloat16, with_sink, device="cuda")
    graph, got = captured(lambda: ops.paged_window_attend(*arguments))
    graph.replay()
    wanted = packed(arguments, held)
    torch.testing.assert_close(got.float(), wanted.float(), atol=1.6e-2, rtol=1.6e-2)
    # Row 0 becomes padding; row 2 loses its sinks, and all of row 5 is in the null block.
    query, new_keys, new_values, memory, table, starts, lengths, _, part, lse, *_ = arguments
    for x in (query, new_keys, new_values, part, lse):
        x[0] = torch.nan
    table[0], lengths[0], starts[0] = 1 << 30, -1, -50
    table[2, 0] = 0
    table[5] = 0
    lse[5] = -torch.inf
    query.mul_(1.5)
    before = memory.clone()
    got.fill_(torch.nan)
    graph.replay()
    replayed = got.clone()
    table[0] = 0
    wanted = reference.paged_window_attend(*arguments)
    torch.testing.assert_close(replayed.float(), wanted.float(), atol=1.6e-2, rtol=1.6e-2)
    assert not replayed[[0, 5]].any()
    torch.testing.assert_close(memory, before, rtol=0, atol=0, equal_nan=True)
    lengths.fill_(-1)
    graph.replay()
    assert not got.any()


@pytest.mark.parametrize("preset", ["balanced", "paper"])
def test_a_step_of_an_engine_in_one_graph(preset):
    """A page is encoded, all of them are selected from, the new token is stored: three operators."""
    arguments, held = given(128, 2, 4, torch.bfloat16, starts=[0] * 3, lengths=[200, 180, 140], device="cuda")
    query, _, _, memory, table, starts, *_ = arguments
    fmt = page_format(preset, 2, 2, 128, 128)
    found, constants = empty_pools(fmt, 4, "cuda"), pages_of(fmt, torch.bfloat16, 1)[2]
    first, encoded = numbers(SINKS, SINKS, SINKS), numbers(-1, 2, -1)
    pages, counts = numbers(1, 2, 3)[:, None], numbers(0, 128 - SINKS, 0)[:, None]
    per_page, budgets = numbers(*[128 - SINKS] * 3), numbers(50, 50, 50)
    starts.copy_(numbers(0, 128, 0))

    def step():
        ops.encode_paged(memory, table, first, per_page, encoded, *found, constants, fmt.name)
        part = ops.sparse_decode(
            query, *found, pages, counts, budgets, 64, constants, arguments[-1], fmt.name
        )
        return ops.paged_window_attend(*arguments[:8], *part, None, arguments[-1])

    def check(got):
        keys, values = (x[..., SINKS:128, :].contiguous() for x in held)
        wide = [torch.nn.functional.pad(x, (0, 0, 0, SINKS)) for x in (keys, values)]
        index, payload = ops.encode(*wide, per_page, constants, fmt.name)
        own = numbers(0, 1, 2)[:, None]
        part = ops.sparse_decode(
            query, index, payload, own, counts, budgets, 64, constants, arguments[-1], fmt.name
        )
        arguments[8:10] = part
        wanted = packed(arguments, held)
        torch.testing.assert_close(got.float(), wanted.float(), atol=1.6e-2, rtol=1.6e-2)

    with served():
        graph, got = captured(step)
    graph.replay()
    check(got)
    encoded.copy_(numbers(1, -1, 3))
    counts.fill_(128 - SINKS)
    starts.fill_(128)
    graph.replay()
    check(got)
