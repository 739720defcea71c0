"""Attention over full-precision tokens on the GPU, with each kernel of PyTorch, against its definition."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from selfindex.attention import kernels
from selfindex.attention.exact import FEW_QUERIES, exact_part
from selfindex.attention.shared import Shared
from selfindex.backends.partial import attend_exact
from selfindex.store.window import Window

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}
LONG = FEW_QUERIES + 45
FLASH, EFFICIENT, CUDNN, MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
HALF, ALL = (torch.float16, torch.bfloat16), tuple(TOLERANCE)
SERVED = {FLASH: HALF, CUDNN: HALF, EFFICIENT: ALL, MATH: ALL}


def held_tokens(lengths, heads, dim, dtype):
    window = Window(torch.empty(len(lengths), heads, 0, dim, dtype=dtype, device="cuda"))
    window.reserve(max(lengths) + 3)
    window.keys.fill_(torch.nan)
    window.values.fill_(torch.nan)
    for b, n in enumerate(lengths):
        window.put(
            slice(b, b + 1), 0, *(torch.randn(heads, n, dim, device="cuda").to(dtype) for _ in range(2))
        )
    return window


def new_tokens(window, new, groups):
    """(query, keys, values), laid out as they leave a projection."""
    batch, heads, _, dim = window.keys.shape
    return tuple(
        torch.randn(batch, new, n, dim, device="cuda").to(window.keys.dtype).transpose(1, 2)
        for n in (heads * groups, heads, heads)
    )


def check(window, tokens, valid=None, scaling=0.1):
    query, keys, values = tokens
    new, width = query.shape[2], window.width
    output, lse = exact_part(window, *tokens, valid, scaling, Shared())
    visible = torch.zeros(query.shape[0], new, width + new, dtype=torch.bool, device="cuda")
    for b, length in enumerate(window.lengths):
        visible[b, :, :length] = True
        causal = torch.ones(new, new, dtype=torch.bool, device="cuda").tril()
        visible[b, :, width:] = causal if valid is None else causal & valid[b]
    old = [x[:, :, :width].nan_to_num(0) for x in (window.keys, window.values)]
    joined = [torch.cat(x, 2) for x in zip(old, (keys, values), strict=True)]
    wanted, wanted_lse = attend_exact(query, *joined, visible[:, None, None], scaling)
    assert output.isfinite().all()
    assert not lse.isnan().any()
    real = slice(None) if valid is None else valid
    tolerance = TOLERANCE[query.dtype]
    for got, right in ((output.float(), wanted), (lse, wanted_lse)):
        got, right = got.transpose(1, 2)[real], right.transpose(1, 2)[real]
        torch.testing.assert_close(got, right, atol=tolerance, rtol=tolerance)
    return output, lse


@pytest.mark.parametrize(
    ("backend", "dtype"), [(b, t) for b, dtypes in SERVED.items() for t in dtypes], ids=str
)
@pytest.mark.parametrize(("dim", "heads", "groups"), [(64, 2, 3), (80, 3, 1), (128, 1, 4), (256, 2, 2)])
@pytest.mark.parametrize("held", [0, 100, LONG + 9])
def test_every_kernel_agrees_with_the_definition(backend, dtype, dim, heads, groups, held, monkeypatch):
    window, in_blocks, calls = held_tokens([held, held], heads, dim, dtype), kernels.attend_blocks, []
    monkeypatch.setattr(kernels, "attend_blocks", lambda *a: calls.append(1) or in_blocks(*a))
    with sdpa_kernel(backend):
        check(window, new_tokens(window, LONG, groups), scaling=0.7 * dim**-0.5)
    if backend == MATH or (backend == FLASH and dim <= 128):
        assert bool(calls) == (backend == MATH)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("new", [2, 8, FEW_QUERIES, LONG, 1500])
@pytest.mark.parametrize("lengths", [[70, 33, 0], [50, 50, 50]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_rows_of_any_length_with_any_padding(dtype, new, lengths, padded):
    window, valid = held_tokens(lengths, 2, 64, dtype), None
    if padded:
        valid = torch.ones(3, new, dtype=torch.bool, device="cuda")
        valid[0, new - new // 3 :] = False
        valid[1, : new // 2] = False
        valid[2] = False
    output, lse = check(window, new_tokens(window, new, 4), valid)
    if padded and new > FEW_QUERIES:
        assert not output[2].any()
        assert (lse[2] == -torch.inf).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_memory_is_linear(dtype, padded):
    window, peaks = held_tokens([100, 60], 2, 64, dtype), []
    for new in (4096, 8192):
        tokens = new_tokens(window, new, 2)
        valid = torch.ones(2, new, dtype=torch.bool, device="cuda") if padded else None
        if padded:
            valid[0, :9] = False
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        exact_part(window, *tokens, valid, 0.1, Shared())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # Queries, keys, values and outputs, each once or twice.
    assert peaks[1] < 2.3 * peaks[0]
    assert peaks[1] < 8 * sum(x.nbytes for x in tokens)
