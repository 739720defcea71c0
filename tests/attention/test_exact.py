"""Attention over full-precision tokens through PyTorch's kernels, against plain PyTorch with a mask."""

import pytest
import torch
from allocations import LargestTensor
from pages import HEAD_DIMS, gaussian
from stores import fill, new_store, paper_config, random_tokens, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from selfindex.attention import attend as attend_module
from selfindex.attention import exact, kernels
from selfindex.attention.exact import FEW_QUERIES, exact_part
from selfindex.attention.shared import Shared
from selfindex.backends import reference
from selfindex.backends.operators import dense_attend
from selfindex.backends.partial import attend_exact
from selfindex.store.window import Window

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LONG = FEW_QUERIES + 1
WAYS = ["kernels", "kernels without groups", "blocks"]


@pytest.fixture
def way(request, monkeypatch):
    """Go the way that a device with other kernels goes."""
    choose = torch._fused_sdp_choice

    def ungrouped(*arguments, enable_gqa, **options):
        return SDPBackend.MATH.value if enable_gqa else choose(*arguments, enable_gqa=False, **options)

    if request.param == "kernels without groups":
        monkeypatch.setattr(torch, "_fused_sdp_choice", ungrouped)
    elif request.param == "blocks":
        monkeypatch.setattr(kernels, "KERNELS", {})
        monkeypatch.setattr(kernels, "BLOCK", 96)
    return request.param


def held_tokens(lengths, heads=2, dim=64, dtype=torch.float32):
    """Full-precision tokens of rows of these lengths; what no token was written to is NaN."""
    window = Window(torch.empty(len(lengths), heads, 0, dim, dtype=dtype))
    window.reserve(max(lengths) + 3)
    window.keys.fill_(torch.nan)
    window.values.fill_(torch.nan)
    for b, n in enumerate(lengths):
        tokens = [gaussian(heads, n, dim, seed=10 * b + i, dtype=dtype) for i in (7, 8)]
        window.put(slice(b, b + 1), 0, *tokens)
    return window


def new_tokens(window, new, groups=2, size=1.0):
    """(query, keys, values)."""
    batch, heads, _, dim = window.keys.shape
    shapes = (heads * groups, heads, heads)
    return tuple(
        (size * gaussian(batch, n, new, dim, seed=i)).to(window.keys.dtype) for i, n in enumerate(shapes)
    )


def with_mask(window, query, keys, values, valid, scaling):
    """The same by the definition: everything held, and of the new tokens the earlier ones and itself."""
    new, width = query.shape[2], window.width
    visible = torch.zeros(query.shape[0], new, width + new, dtype=torch.bool)
    for b, length in enumerate(window.lengths):
        real = torch.ones(new, dtype=torch.bool) if valid is None else valid[b]
        visible[b, :, :length] = True
        visible[b, :, width:] = torch.ones(new, new, dtype=torch.bool).tril() & real
    old = [x[:, :, :width].nan_to_num(0) for x in (window.keys, window.values)]
    joined = [torch.cat(x, 2) for x in zip(old, (keys, values), strict=True)]
    return attend_exact(query, *joined, visible[:, None, None], scaling)


def check(window, tokens, valid=None, scaling=0.125):
    output, lse = exact_part(window, *tokens, valid, scaling, Shared())
    wanted, wanted_lse = with_mask(window, *tokens, valid, scaling)
    assert output.shape == wanted.shape
    assert lse.dtype == torch.float32
    assert output.isfinite().all()
    assert not lse.isnan().any()
    tolerance = TOLERANCE[tokens[0].dtype]
    real = slice(None) if valid is None else valid
    got, wanted = output.float().transpose(1, 2)[real], wanted.transpose(1, 2)[real]
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    got, wanted = lse.transpose(1, 2)[real], wanted_lse.transpose(1, 2)[real]
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    return output, lse


def padding(batch, new):
    """Right padding in the first row, left padding and a hole in the next, then a row of padding only."""
    valid = torch.ones(batch, new, dtype=torch.bool)
    valid[0, new - new // 3 :] = False
    valid[1, : new // 2] = False
    valid[1, new - 2] = False
    valid[2:3] = False
    return valid


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("new", [1, 2, 8, LONG - 1, LONG, 600])
@pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [100] * 4, [70, 33, 5, 0]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_any_length_with_any_padding(way, new, lengths, padded):
    window = held_tokens(lengths)
    valid = padding(4, new) if padded and new > 1 else None
    check(window, new_tokens(window, new), valid)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("heads", "groups"), [(2, 3), (1, 4), (3, 1)], ids=["gqa", "mqa", "mha"])
@pytest.mark.parametrize("new", [3, LONG])
def test_dtypes_head_dims_and_groups(way, dtype, dim, heads, groups, new):
    window = held_tokens([60], heads, dim, dtype)
    check(window, new_tokens(window, new, groups), scaling=0.7 * dim**-0.5)


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_more_held_tokens_than_new_ones(way):
    window = held_tokens([700, 500])
    check(window, new_tokens(window, LONG))


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("new", [5, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(way, new, dtype):
    window = held_tokens([40], dtype=dtype)
    tokens = new_tokens(window, new, size=40.0)
    assert with_mask(window, *tokens, None, 1.0)[1].max() > 1e4
    output, lse = exact_part(window, *tokens, None, 1.0, Shared())
    wanted, wanted_lse = with_mask(window, *tokens, None, 1.0)
    torch.testing.assert_close(lse, wanted_lse, atol=0.1, rtol=1e-4)
    # Weights of bfloat16 are rounded to 8 bits; values are as large as the keys here.
    torch.testing.assert_close(output.float(), wanted, atol=40 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_row_of_padding_only_has_no_part(way):
    window = held_tokens([0, 9])
    valid = torch.ones(2, LONG, dtype=torch.bool)
    valid[0] = False
    output, lse = check(window, new_tokens(window, LONG), valid)
    assert not output[0].any()
    assert (lse[0] == -torch.inf).all()


def test_the_choice_of_a_kernel_is_that_of_sdpa(monkeypatch):
    window, calls, in_blocks = held_tokens([30]), [], kernels.attend_blocks
    monkeypatch.setattr(kernels, "attend_blocks", lambda *a: calls.append(1) or in_blocks(*a))
    check(window, new_tokens(window, LONG))
    assert not calls
    for n, other in enumerate((SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION)):  # none of a CPU's
        with sdpa_kernel(other):
            check(window, new_tokens(window, LONG))
        assert len(calls) == n + 1


@pytest.mark.parametrize("gone", ["choice", "operators"])
def test_without_pytorchs_private_operators_it_goes_on_in_blocks(gone, monkeypatch):
    if gone == "choice":
        monkeypatch.delattr(torch, "_fused_sdp_choice")
    else:
        renamed = {key: (name + "_renamed", further) for key, (name, further) in kernels.KERNELS.items()}
        monkeypatch.setattr(kernels, "KERNELS", renamed)
    window = held_tokens([30, 20])
    for new in (4, LONG):
        check(window, new_tokens(window, new))


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("padded", [False, True])
def test_memory_is_linear(way, padded):
    window, new = held_tokens([90, 70, 0]), 2048
    tokens = new_tokens(window, new, groups=1)
    valid = padding(3, new) if padded else None
    with LargestTensor() as largest:
        exact_part(window, *tokens, valid, 0.125, Shared())
    assert largest.bytes <= tokens[0].nbytes * (new + 90) // new


def test_blocks_of_queries_bound_what_decoded_tokens_meet(monkeypatch):
    store = new_store(small_config(budget=1.0))
    fill(store, 1000)
    query = random_tokens(store, 300)[2]
    pages = store.pool.index, store.pool.payload, *store.table.tensors()
    call = (query, *pages, store.constants, 0.125, store.format.name)
    whole = reference.dense_attend(*call)
    monkeypatch.setattr(dense_attend, "DENSE_QUERIES", 100)
    with LargestTensor() as largest:
        blocks = reference.dense_attend(*call)
    assert largest.bytes < 4 * store.format.kv_heads * 2 * 300 * store.encoded(0) / 2
    for got, wanted in zip(blocks, whole, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", [small_config, paper_config])
@pytest.mark.parametrize("budget", [1.0, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_a_chunk_in_blocks_of_queries_is_the_whole_chunk(config, budget, padded, monkeypatch):
    store = new_store(config(budget=budget, sparse_queries=20), batch=3)
    fill(store, 60)
    keys, values, query = random_tokens(store, 17, seed=9)
    call = (store, query, keys, values, padding(3, 17) if padded else None, 0.125, torch.ones(4))
    whole, read = attend_module.attend(*call)
    monkeypatch.setattr(attend_module, "BLOCK", 5)
    sizes, name = [], "_dense_part" if budget == 1.0 else "_sparse_part"
    part = getattr(attend_module, name)
    monkeypatch.setattr(
        attend_module, name, lambda s, q, *rest: sizes.append(q.shape[2]) or part(s, q, *rest)
    )
    blocks, read_in_blocks = attend_module.attend(*call)
    assert sizes == [5, 5, 5, 2]
    torch.testing.assert_close(blocks, whole, atol=1e-6, rtol=1e-5)
    assert read == read_in_blocks


@pytest.mark.parametrize("lengths", [[0, 0, 0], [4, 0, 2]])
def test_no_query_is_without_a_key(lengths):
    """What a kernel makes of one that is differs, and NaN of padding would spread to later layers."""
    bias = exact._bias(lengths, torch.empty(3, 4, 9, 64), padding(3, 9))
    assert (bias == 0).any(-1).all()
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert (bias[:, 0, :, max(lengths) :][:, later] == -torch.inf).all()


def test_padding_is_told_apart_in_a_pass(monkeypatch):
    """What is made once in a pass is that of the same lengths, number of tokens, dtype and padding."""
    shared, made, bias = Shared(), [], exact._bias
    monkeypatch.setattr(exact, "_bias", lambda *a: made.append(1) or bias(*a))
    window = held_tokens([6, 6, 6])
    tokens = new_tokens(window, 4)
    for _ in range(3):
        exact_part(window, *tokens, None, 0.125, shared)
    assert len(made) == 1
    for other in (padding(3, 4), padding(3, 4).flip(0)):
        got = exact_part(window, *tokens, other, 0.125, shared)[0].transpose(1, 2)[other]
        wanted = with_mask(window, *tokens, other, 0.125)[0].transpose(1, 2)[other]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    exact_part(held_tokens([6, 5, 6]), *tokens, None, 0.125, shared)
    assert len(made) == 4
