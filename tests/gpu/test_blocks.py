"""FlexAttention over selected blocks on the GPU, against the plain operator, and how often it is compiled."""

import pytest
import torch
from prompts import random_prompt

from selfindex.backends import fallback, ops, reference
from selfindex.backends.cuda import blocks as module

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 3e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(prompt, scaling, mass, density, last=None):
    served, prompt = [], list(prompt)
    prompt[0] = prompt[0][:, :, -last:] if last else prompt[0]
    selection = ops.select_blocks(*prompt[:2], scaling, mass, density)
    # Of a prompt, or of the `last` of its tokens.
    with fallback.observed(lambda name, fast, arguments: served.append((name, fast))):
        output, lse = ops.block_attend(*prompt, *selection, scaling)
    assert served == [("block_attend", True)]
    wanted, wanted_lse = reference.block_attend(*prompt, *selection, scaling)
    assert last or output.transpose(1, 2).is_contiguous()
    assert output.stride() == torch.empty_like(prompt[0]).stride() or output.shape[0] == 1
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output, wanted, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, wanted_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(2, 4, 128), (2, 3, 64), (1, 6, 96), (3, 1, 256)])
def test_it_is_the_plain_operator(dtype, heads, groups, dim):
    for tokens, batch in ((2000, 1), (4096, 1), (1500, 2)):
        prompt = random_prompt(tokens, batch, heads, groups, dim, dtype, "cuda")
        for mass, density in ((1.0, 1.0), (0.8, 1.0), (1.0, 0.3)):
            check(prompt, dim**-0.5, mass, density)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(2, 4, 128), (1, 7, 64), (1, 6, 96), (3, 1, 256)])
def test_so_it_is_for_the_last_queries(dtype, heads, groups, dim):
    """Also where their first one, or last one, is in the middle of a block."""
    for tokens, last, batch in ((2000, 700, 1), (4096, 1024, 1), (4096, 900, 1), (2500, 1500, 2)):
        prompt = random_prompt(tokens, batch, heads, groups, dim, dtype, "cuda")
        for mass, density in ((1.0, 1.0), (0.8, 1.0), (1.0, 0.3)):
            check(prompt, dim**-0.5, mass, density, last)


def test_other_scales_are_taken_over_by_the_queries():
    check(random_prompt(3000, dtype=torch.bfloat16, device="cuda"), 0.2, 0.9, 0.5)


def test_lengths_and_batches_share_a_compilation():
    module._compiled.cache_clear()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    for tokens, batch in ((1500, 1), (4096, 1), (9000, 1), (2000, 2), (1600, 3)):
        with torch.inference_mode():
            check(random_prompt(tokens, batch, dtype=torch.bfloat16, device="cuda"), 0.125, 0.8, 0.5)
    # Rows that lie behind each other in memory, as a batch of one or padded, and those that do not.
    assert counters["unique_graphs"] <= 3


def test_chunks_share_a_compilation():
    module._compiled.cache_clear()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for tokens, last in ((1500, 600), (4096, 2048), (9000, 700), (9001, 5000), (3000, 2000)):
        with torch.inference_mode():
            check(random_prompt(tokens, dtype=torch.bfloat16, device="cuda"), 0.125, 0.8, 0.5, last)
    # Queries and keys that lie as they were given, and those that were filled up to whole blocks.
    assert counters["unique_graphs"] - before <= 3


@pytest.mark.parametrize("last", [20 * 128 + 60, 900])
@pytest.mark.parametrize("mass", [1.0, 0.9])
def test_selection_is_that_of_a_cpu(last, mass):
    query, keys, _ = random_prompt(20 * 128 + 60)
    query = query[:, :, -last:]
    wanted = ops.select_blocks(query, keys, 0.125, mass, 0.4)
    got = ops.select_blocks(query.cuda(), keys.cuda(), 0.125, mass, 0.4)
    for one, other in zip(got, wanted, strict=True):
        assert (one.cpu() == other).float().mean() > 0.995  # but for estimates that are all but equal
